"""A pretrained sentence encoder -> the same, its last layers trained to tell the kinds of text of this data apart.

Cross entropy over one prototype for each kind, by the cosine; layers below, which know the language, stay as they were.
Knows nothing of n-grams or of none. Letters: N texts, B texts of a batch, C kinds, S width of a sentence's vector.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from cluster.router.run_state import fits, restore, state_of
from cluster.router.sentence_model import SentenceModel

LAYERS = 2
"""The last ones, which are trained."""

_EPOCHS, _MOST_TOKENS = 4, 500_000
"""Each text is read four times, or less often where that would be more tokens: some minutes at most, of any data."""

_BATCH = 64
_DRAWN = 4
"""Batches' worth of texts that are drawn for one batch, of like length: of all texts together half would be padding."""

_RATE, _PROTOTYPE_RATE = 2e-4, 5e-3
_WARM_UP = 0.1
"""Share of the steps in which the rates rise; then they fall to zero in a straight line."""

_SHARPNESS = 20.0
_TEXTS_OF_KIND = 8
"""As many as a kind's first prototype is the mean of."""


class Tuning:
    """A training run. `step` it `num_steps` times; then `model` changes no more."""

    def __init__(self, pretrained: SentenceModel, texts: Sequence[str], kinds_N: Tensor, seed: int) -> None:
        """`kinds_N` numbers what each text is, without gaps; -1 where nothing is to be learned."""
        kept = (kinds_N >= 0).nonzero().flatten().tolist()
        self._texts, self._kinds_N = [texts[index] for index in kept], kinds_N[kept]
        self.model = pretrained.thawed(LAYERS)
        """What the pretrained one has become so far."""
        num_tokens = sum(map(pretrained.num_tokens, self._texts))
        num_read = len(kept) * min(_EPOCHS, _MOST_TOKENS / max(1, num_tokens))
        self.num_steps = math.ceil(num_read / _BATCH)
        self._num_done = 0
        self._rng = torch.Generator().manual_seed(seed)
        # As in the router's own training.
        self._weights_N = self._kinds_N.bincount()[self._kinds_N].double().rsqrt()
        self.mean_S, first_CS = _means(pretrained, self._texts, self._kinds_N)
        self.prototypes_CS = nn.Parameter(first_CS)
        self._trained = [self.prototypes_CS, *self.model.trained()]
        groups = ((self._trained[:1], _PROTOTYPE_RATE), (self._trained[1:], _RATE))
        self._optimizer = torch.optim.Adam([{"params": group, "top": rate} for group, rate in groups], fused=True)

    def step(self) -> float:
        """One optimizer step; returns its loss, in nats."""
        self._num_done += 1
        progress = self._num_done / (self.num_steps + 1)
        for group in self._optimizer.param_groups:
            group["lr"] = group["top"] * min(progress / _WARM_UP, (1 - progress) / (1 - _WARM_UP))
        drawn_B = self._draw()
        vectors_BS = self.model.vectors([self._texts[index] for index in drawn_B.tolist()])
        z_BS = nn.functional.normalize(vectors_BS - self.mean_S, dim=1)
        logits_BC = _SHARPNESS * z_BS @ nn.functional.normalize(self.prototypes_CS, dim=1).T
        loss = nn.functional.cross_entropy(logits_BC, self._kinds_N[drawn_B])
        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self._optimizer.step()
        return loss.item()

    def _draw(self) -> Tensor:
        """int64 [B]: of several batches' worth of texts in the order of their lengths, one batch."""
        drawn = torch.multinomial(self._weights_N, _DRAWN * _BATCH, replacement=True, generator=self._rng).tolist()
        drawn.sort(key=lambda index: len(self._texts[index]))
        first = _BATCH * int(torch.randint(_DRAWN, (), generator=self._rng))
        return torch.tensor(drawn[first : first + _BATCH])

    def state_dict(self) -> dict[str, Tensor]:
        """All that changes from step to step, as plain tensors."""
        state = state_of(self._trained, self._optimizer)
        return state | {"random": self._rng.get_state(), "num_done": torch.tensor(self._num_done)}

    def fits(self, state: Mapping[str, Tensor]) -> bool:
        """Whether `state` may be of a run on the same texts."""
        return fits(self._trained, state)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state_dict` was called, of a run on the same texts."""
        restore(self._trained, self._optimizer, state)
        self._rng.set_state(state["random"])
        self._num_done = int(state["num_done"])


def kinds_of(labels_N: Tensor, topics: Sequence[str] | None, num_domains: int) -> Tensor:
    """int64 [N]: a number for each topic of each domain, for each domain where no topics are named; -1 for none."""
    pairs = list(zip(labels_N.tolist(), topics or [""] * len(labels_N), strict=True))
    numbers = {pair: number for number, pair in enumerate(sorted({pair for pair in pairs if pair[0] < num_domains}))}
    return torch.tensor([numbers.get(pair, -1) for pair in pairs])


def _means(model: SentenceModel, texts: Sequence[str], kinds_N: Tensor) -> tuple[Tensor, Tensor]:
    """[S], the mean over the first texts of each kind, and [C, S], how far each kind's own lies from it."""
    rows_C = [(kinds_N == kind).nonzero().flatten()[:_TEXTS_OF_KIND] for kind in range(int(kinds_N.max()) + 1)]
    sizes = [len(rows) for rows in rows_C]
    vectors_NS = model.embed([texts[index] for index in torch.cat(rows_C).tolist()])
    kinds_CS = torch.stack([part.mean(0) for part in vectors_NS.split(sizes)])
    mean_S = kinds_CS.mean(0)
    return mean_S, kinds_CS - mean_S
