"""What HTTP clients send and are told about domains, translated to and from our own words."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from cluster.errors import InvalidInput
from deployments.domains.info import DomainChange, DomainHistory, DomainInfo, DomainPage, NewDomain

Json = dict[str, Any]

_MAX_INTEGER = 2**53
"""JSON's numbers are whole up to here in every language."""

FORM_SCHEMA: Json = {
    "type": "object",
    "required": ["name", "adapter_config", "adapter_model"],
    "properties": {
        "name": {"type": "string"},
        "adapter_config": {
            "type": "string",
            "format": "binary",
            "description": "adapter_config.json, as PEFT saves it",
        },
        "adapter_model": {"type": "string", "format": "binary", "description": "adapter_model.safetensors"},
        "zephyra": {"type": "string", "format": "binary", "description": "zephyra.json: which base it is for"},
        "examples": {"type": "string", "description": "prompts, one per line; a file *.jsonl: {'prompt': ...} each"},
        "data_free": {"type": "string", "enum": ["true", "false"]},
        "expected_generation": {"type": "string", "pattern": "^[0-9]+$"},
    },
}
"""Of a form that uploads an adapter."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class AddBody(_Body):
    """The body of POST /v1/domains where nothing is uploaded."""

    name: str
    adapter_uri: str
    """A folder that PEFT saved, below the one that the setting adapter_folder allows."""
    examples: list[str] = []
    """Prompts of the domain; without any it answers by its name only."""
    data_free: bool = False
    """Let words of the adapter stand for examples, a guess."""
    expected_generation: int | None = Field(default=None, ge=0, le=_MAX_INTEGER)
    """Change nothing if the catalog has moved on from this."""

    def translate(self, header: int | None) -> NewDomain:
        """In our own words. Raises `InvalidInput` when field and header contradict each other."""
        expected = one_generation(self.expected_generation, header)
        return NewDomain(self.name, None, self.adapter_uri, tuple(self.examples), self.data_free, expected)


class RollbackBody(_Body):
    """The body of POST /v1/domains/{name}/rollback."""

    version: int | None = Field(default=None, ge=1, le=_MAX_INTEGER)
    """By default the one before the current."""
    expected_generation: int | None = Field(default=None, ge=0, le=_MAX_INTEGER)


class LoadBody(_Body):
    """vLLM's body of POST /v1/load_lora_adapter."""

    lora_name: str
    lora_path: str


class UnloadBody(_Body):
    """vLLM's body of POST /v1/unload_lora_adapter."""

    lora_name: str


def one_generation(field: int | None, header: int | None) -> int | None:
    """The generation a change expects, given as a field, as a header, or as both alike."""
    if field is not None and header is not None and field != header:
        raise InvalidInput(f"expected_generation is {field}, the header says {header}; give one of them.")
    return header if field is None else field


def new_domain(fields: dict[str, str], header: int | None) -> NewDomain:
    """The short fields of a form in our own words. Raises `InvalidInput` for a value that cannot be."""
    flag, expected = fields.get("data_free", "false"), fields.get("expected_generation")
    if "name" not in fields:
        raise InvalidInput("The form has no field 'name'; give the domain's name.")
    if flag not in ("true", "false"):
        raise InvalidInput(f"data_free is {flag[:80]!r}; expected true or false.")
    if expected is not None and not (expected.isascii() and expected.isdecimal() and len(expected) <= 16):
        raise InvalidInput(f"expected_generation is {expected[:80]!r}; expected a number.")
    generation = one_generation(None if expected is None else int(expected), header)
    return NewDomain(fields["name"], is_data_free=flag == "true", expected_generation=generation)


def domain_json(info: DomainInfo) -> Json:
    """One domain."""
    return {
        "object": "domain",
        "name": info.name,
        "model": f"zephyra:{info.name}",
        "version": info.version,
        "rank": info.rank,
        "bytes": info.num_bytes,
        "prototypes": info.num_prototypes,
        "data_free": info.is_data_free,
        "tags": dict(info.tags),
        "aliases": list(info.aliases),
        "problem": info.problem,
    }


def history_json(history: DomainHistory) -> Json:
    """One domain with its versions and files."""
    return {
        **domain_json(history.current),
        "versions": list(history.versions),
        "files": dict(history.files),
        "generation": history.generation,
    }


def page_json(page: DomainPage) -> Json:
    """A page of domains, in the shape of OpenAI's lists."""
    return {
        "object": "list",
        "data": [domain_json(info) for info in page.domains],
        "has_more": page.has_more,
        "generation": page.generation,
    }


def change_json(change: DomainChange) -> Json:
    """What a change has made current."""
    return {
        "object": "domain.change",
        "name": change.domain,
        "version": change.version,
        "generation": change.generation,
    }
