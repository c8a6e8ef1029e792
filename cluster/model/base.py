"""Loading a base, float or quantized: Zephyra Fusion or any Hugging Face causal language model, from a local folder.

Only safetensors and JSON are read, and no code that lies beside a model is run.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from cluster.config.settings import Quantization
from cluster.errors import InvalidInput, NotTrained
from cluster.messages import ChatMessage, Prompt, Role
from cluster.model.quantization import num_weights, weight_bytes
from cluster.model.quantized_artifact import (
    COPIED_SUFFIXES,
    is_quantized,
    load_quantized,
    read_manifest,
    save_quantized,
)
from cluster.model.servable import skeleton_of


@dataclass(frozen=True, slots=True)
class Base:
    """A base ready to run: in eval mode, its parameters frozen."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    """Of the float weights, also where they are served quantized: what an adapter must have been trained on."""
    name: str

    @property
    def context_tokens(self) -> int:
        """Prompt and answer together, in tokens."""
        return int(self.model.config.max_position_embeddings)

    @property
    def num_parameters(self) -> int:
        """Parameters, tied ones once."""
        return num_weights(self.model)

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights, tied ones once."""
        return weight_bytes(self.model)


def load_base(folder: Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Base:
    """Load the model and tokenizer in `folder`. Raises `NotTrained` when there is none, and `CorruptArtifact` for a
    quantized one that is damaged.
    """
    if not (folder / "config.json").is_file():
        raise NotTrained(f"There is no model in {folder}; train one with `zephyra train all`, or name another folder.")
    if is_quantized(folder):
        model, name = load_quantized(folder, dtype), read_manifest(folder).base_fingerprint
    else:
        model, name = _load_float(folder, dtype), fingerprint(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    torch.nn.Module.to(model, device)
    model.eval().requires_grad_(False)
    return Base(model, tokenizer, name, folder.name)


def saved_dtype(folder: Path) -> torch.dtype:
    """What the base in `folder` is served in by default: float32 or bfloat16, which also stands for float16."""
    return torch.float32 if written_dtype(folder) == torch.float32 else torch.bfloat16


def written_dtype(folder: Path) -> torch.dtype:
    """The numbers that the base in `folder` was saved in, by its configuration."""
    config = json.loads((folder / "config.json").read_text())
    dtype: torch.dtype = getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")
    return dtype


def quantize_base(source: Path, folder: Path, quantization: Quantization) -> None:
    """Write the quantized form of the float base in `source` into `folder`, an empty one. Holds the floats meanwhile.

    Raises `NotTrained` when there is no base, and `InvalidInput` for one that is quantized or cannot be.
    """
    if not (source / "config.json").is_file():
        raise NotTrained(f"There is no model in {source}; name a folder with a config.json.")
    if is_quantized(source):
        raise InvalidInput(f"The base in {source.name!r} is quantized already; quantize the one it was made of.")
    save_quantized(_load_float(source, "auto"), quantization, source, fingerprint(source), folder)


def skeleton(folder: Path) -> PreTrainedModel:
    """The float base in `folder` without its weights: the names and shapes of its layers, at no cost of memory."""
    return skeleton_of(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False))


def _load_float(folder: Path, dtype: torch.dtype | Literal["auto"]) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, local_files_only=True, trust_remote_code=False
    )
    return model


def fingerprint(folder: Path) -> str:
    """16 hex digits that name the weights and shape of the float base in `folder`: SHA-256 over its safetensors files
    and its configuration. Where they lie, and the library version that wrote them, do not matter.
    """
    digest = hashlib.sha256()
    config = json.loads((folder / "config.json").read_text())
    shape = {key: value for key, value in config.items() if key not in ("transformers_version", "_name_or_path")}
    digest.update(json.dumps(shape, sort_keys=True).encode())
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def encode_answer(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """Token ids of an answer that follows a prompt, as training encodes responses: of the text alone, and no end.

    So a prompt's tokens are the same whatever follows, where cutting both as one text might join their border. For a
    base that continues raw text, what separates the two belongs to the answer: " Paris". As in a prompt, the names of
    special tokens are nothing but text.
    """
    return encode_answers(tokenizer, [answer])[0]


def encode_answers(tokenizer: PreTrainedTokenizerBase, answers: Sequence[str]) -> list[list[int]]:
    """`encode_answer` of each, in one call: many at once take half the time."""
    return _ids(tokenizer, answers, add_special_tokens=False)


def copy_base(source: Path, folder: Path, weights: bool = True) -> None:
    """Copy a float base from `source` into `folder`, an empty one: safetensors, configuration, tokenizer, no code.

    Without `weights` all but the safetensors and their index.
    """
    for file in sorted(source.iterdir()):
        is_of_weights = ".safetensors" in file.suffixes
        if file.is_file() and file.suffix in (".safetensors", *COPIED_SUFFIXES) and (weights or not is_of_weights):
            shutil.copyfile(file, folder / file.name)


def as_question(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], Prompt]:
    """How a single question is put to this base, in training and where it is measured.

    As a chat of one turn where the base has a template for chats, since that is how it will be asked; as plain text
    where that gives the same tokens, or where there is no template.
    """

    def as_turn(text: str) -> Prompt:
        return (ChatMessage(Role.USER, text),)

    is_turn = tokenizer.chat_template is None or encode_prompt(tokenizer, "a") == encode_prompt(tokenizer, as_turn("a"))
    if is_turn:
        return str
    return as_turn


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of a completion's prompt, or of a chat through the model's own template.

    What a user wrote is text and nothing else: `<|assistant|>` in it is encoded by its letters, so that nobody can
    forge a turn. Without a template a chat is the texts of its turns, an empty line between them: one turn is then a
    completion's prompt. Raises `InvalidInput` for a chat that the template refuses.
    """
    if not isinstance(prompt, str) and tokenizer.chat_template is None:
        prompt = "\n\n".join(message.content for message in prompt)
    if isinstance(prompt, str):
        return _ids(tokenizer, [prompt])[0]
    messages = [{"role": message.role.value, "content": message.content} for message in prompt]
    try:
        encoded: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, sanitize_control_tokens=True, return_dict=True
        )
    except (jinja2.TemplateError, ValueError) as error:
        raise InvalidInput(f"The chat template of this base refuses the messages: {error}.") from error
    return list(encoded["input_ids"])


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[list[int]]:
    """`encode_prompt` of each; plain texts in one call."""
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if len(texts) < len(prompts):
        return [encode_prompt(tokenizer, prompt) for prompt in prompts]
    return _ids(tokenizer, texts)


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
    """Token ids of each text, in which the names of special tokens are nothing but text."""
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=add_special_tokens,
        split_special_tokens=True,
        return_attention_mask=False,
        verbose=False,
    )
    return [list(ids) for ids in encoded["input_ids"]]
