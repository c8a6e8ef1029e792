"""A pretrained sentence encoder that reads no text twice: the same texts come again with every seed and scenario.

What it once took is counted each time, so that a training's seconds are those of a training alone. Letters: B texts, S
width of a sentence's vector.
"""

import time
from collections.abc import Sequence
from importlib import metadata

import torch
from torch import Tensor

from cluster.router.sentence_model import PACKAGE, SentenceModel


class RememberingModel(SentenceModel):
    """`model`, with a memory."""

    def __init__(self, model: SentenceModel) -> None:
        self._inner = model
        self.width = model.width
        self.saved_s = 0.0
        """What was not waited for so far, because a text was remembered."""
        self._known: dict[str, Tensor] = {}
        self._took_s: dict[str, float] = {}

    @property
    def num_parameters(self) -> int:
        return self._inner.num_parameters

    def words(self) -> list[str]:
        return self._inner.words()

    def thawed(self, num_layers: int) -> SentenceModel:
        return self._inner.thawed(num_layers)

    def num_tokens(self, text: str) -> int:
        return self._inner.num_tokens(text)

    def embed(self, texts: Sequence[str]) -> Tensor:
        """As the model does; each text that is new is read once."""
        fresh = list(dict.fromkeys(text for text in texts if text not in self._known))
        self.saved_s += sum(self._took_s.get(text, 0.0) for text in texts)
        start_s = time.perf_counter()
        self._known.update(zip(fresh, self._inner.embed(fresh), strict=True))
        each_s = (time.perf_counter() - start_s) / max(1, len(fresh))
        self._took_s.update(dict.fromkeys(fresh, each_s))
        return torch.stack([self._known[text] for text in texts])

    def forgetful(self) -> SentenceModel:
        """The model itself, as it is served."""
        return self._inner


def installed_encoder() -> str | None:
    """The package that carries the pretrained encoder, where it is installed."""
    try:
        metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return None
    return PACKAGE
