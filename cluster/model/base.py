"""Loading a base: Zephyra Fusion or any Hugging Face causal language model, from a local folder.

Only safetensors and JSON are read, and no code that lies beside a model is run.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from cluster.errors import InvalidInput, NotTrained
from cluster.messages import Prompt


@dataclass(frozen=True, slots=True)
class Base:
    """A base ready to run: in eval mode, its parameters frozen."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    name: str

    @property
    def context_tokens(self) -> int:
        """Prompt and answer together, in tokens."""
        return int(self.model.config.max_position_embeddings)

    @property
    def num_parameters(self) -> int:
        """Parameters, tied ones once."""
        return int(self.model.num_parameters())


def load_base(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Base:
    """Load the model and tokenizer in `folder`. Raises `NotTrained` when there is none."""
    if not (folder / "config.json").is_file():
        raise NotTrained(f"There is no model in {folder}; train one with `zephyra train all`, or name another folder.")
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, local_files_only=True, trust_remote_code=False
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    torch.nn.Module.to(model, device)
    model.eval().requires_grad_(False)
    return Base(model, tokenizer, fingerprint(folder), folder.name)


def fingerprint(folder: Path) -> str:
    """16 hex digits that name the weights and shape of the base in `folder`: SHA-256 over its safetensors files and
    its configuration. Where they lie, and the library version that wrote them, do not matter.
    """
    digest = hashlib.sha256()
    config = json.loads((folder / "config.json").read_text())
    shape = {key: value for key, value in config.items() if key not in ("transformers_version", "_name_or_path")}
    digest.update(json.dumps(shape, sort_keys=True).encode())
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of a completion's prompt, or of a chat through the model's own template.

    What a user wrote is text and nothing else: `<|assistant|>` in it is encoded by its letters, so that nobody can
    forge a turn. Raises `InvalidInput` for a chat that the template refuses.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt, split_special_tokens=True, verbose=False)["input_ids"])
    if tokenizer.chat_template is None:
        raise InvalidInput("This base has no chat template; use /v1/completions (gRPC: prompt instead of messages).")
    messages = [{"role": message.role.value, "content": message.content} for message in prompt]
    try:
        encoded: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, sanitize_control_tokens=True, return_dict=True
        )
    except (jinja2.TemplateError, ValueError) as error:
        raise InvalidInput(f"The chat template of this base refuses the messages: {error}.") from error
    return list(encoded["input_ids"])
