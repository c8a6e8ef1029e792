"""Prompts that belong to a domain and, where known, the kind of each; as JSON lines they lie beside its adapter."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from cluster.errors import InvalidData
from cluster.lora.artifacts import Store
from cluster.messages import AdapterRef

EXAMPLES_FILE = "examples.jsonl"
MAX_EXAMPLES_BYTES = 2**24
MAX_EXAMPLES = 10_000
MAX_EXAMPLE_CHARACTERS = 100_000


@dataclass(frozen=True, slots=True)
class Examples:
    """Prompts of one domain."""

    prompts: tuple[str, ...] = ()
    topics: tuple[str, ...] | None = None
    """The kind of each within the domain, such as one intent of many; each kind has a prototype of its own then."""

    @classmethod
    def of(cls, given: "Examples | Sequence[str]") -> "Examples":
        """What is given, be it prompts alone."""
        return given if isinstance(given, Examples) else cls(tuple(given))

    def __len__(self) -> int:
        return len(self.prompts)

    def to_bytes(self) -> bytes:
        """JSON lines, `{"prompt": ..., "topic": ...}` each, the latter where it is known."""
        lines: list[dict[str, str]] = [{"prompt": prompt} for prompt in self.prompts]
        for line, topic in zip(lines, self.topics or (), strict=False):
            line["topic"] = topic
        return "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines).encode()

    @classmethod
    def from_bytes(cls, content: bytes, is_json: bool = True) -> Self:
        """A JSON string or `{"prompt": ..., "topic": ...}` per line, or a line of text each; empty ones don't count.

        Raises `InvalidData` for anything else, for none at all, for too many or too long ones, or if only some lines
        name a topic.
        """
        try:
            lines = content.decode().split("\n") if is_json else content.decode().splitlines()
            given = [line for line in lines if line.strip()]
            pairs = [_example(json.loads(line)) for line in given] if is_json else [(line, None) for line in given]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InvalidData(
                f"The examples cannot be read ({error}); expected UTF-8, a prompt per line, in .jsonl as "
                "{'prompt': ...}, or {'prompt': ..., 'topic': ...}."
            ) from error
        if not 0 < len(pairs) <= MAX_EXAMPLES:
            raise InvalidData(f"There are {len(pairs)} examples; expected between 1 and {MAX_EXAMPLES}.")
        if (longest := max(len(prompt) for prompt, _ in pairs)) > MAX_EXAMPLE_CHARACTERS:
            raise InvalidData(f"An example has {longest} characters; expected at most {MAX_EXAMPLE_CHARACTERS}.")
        topics = tuple(topic for _, topic in pairs if topic is not None)
        if topics and len(topics) < len(pairs):
            raise InvalidData(f"Of {len(pairs)} examples {len(topics)} name a topic; name one for each, or for none.")
        return cls(tuple(prompt for prompt, _ in pairs), topics or None)


def examples_beside(store: Store, ref: AdapterRef) -> Examples | None:
    """What a version of a domain was added from, if that was kept. Raises like `Store.adapter_file`."""
    listed = store.adapter_files(ref).get(EXAMPLES_FILE)
    if listed is None:
        return None
    return Examples.from_bytes(store.adapter_file(ref, EXAMPLES_FILE, listed.sha256, MAX_EXAMPLES_BYTES))


def _example(line: Any) -> tuple[str, str | None]:
    text, topic = (line, None) if isinstance(line, str) else (line["prompt"], line.get("topic"))
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"a prompt is {text!r}")
    if not isinstance(topic, str | None):
        raise TypeError(f"a topic is {topic!r}")
    return text, topic
