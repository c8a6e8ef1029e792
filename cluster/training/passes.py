"""Documents arranged for one base: a pass is one long row, domain after domain, without padding.

Letters: T tokens, M labelled tokens, D hidden size, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cluster.kernels import training as kernels
from cluster.lora.weights import replace_layer
from cluster.training.data import Example
from cluster.training.documents import documents
from cluster.training.grouped_lora import GroupedAdapters, Stretch


@dataclass(frozen=True, slots=True)
class Pass:
    """Whole documents one after the other."""

    ids_T: Tensor
    positions_T: Tensor
    lengths: tuple[int, ...]
    """Tokens of each document."""
    stretches: tuple[Stretch, ...]
    """The tokens of each domain."""
    labelled_M: Tensor
    """Where the tokens are that predict something."""
    labels_M: Tensor
    """What each of them is to predict."""
    labelled_stretches: tuple[Stretch, ...]
    """The labelled tokens of each domain."""

    def to(self, device: torch.device) -> Self:
        """The same there."""
        return replace(
            self,
            ids_T=self.ids_T.to(device),
            positions_T=self.positions_T.to(device),
            labelled_M=self.labelled_M.to(device),
            labels_M=self.labels_M.to(device),
        )


def arrange(rows: Mapping[str, Sequence[Example]], tokens_per_pass: int, learn_prompts: bool = False) -> list[Pass]:
    """Every domain's examples in their order, in passes of at most so many tokens, or of one longer example.

    A domain is divided as if it were alone, and passes are filled with its parts: so its sums are added up in the same
    order whoever else learns. Responses are to be predicted, and prompts too if `learn_prompts`.
    """
    passes: list[list[tuple[str, Example]]] = [[]]
    filled = 0
    for domain, examples in rows.items():
        for part, size in _parts(examples, tokens_per_pass):
            if passes[-1] and filled + size > tokens_per_pass:
                passes.append([])
                filled = 0
            passes[-1] += [(domain, example) for example in part]
            filled += size
    return [_pass(group, learn_prompts) for group in passes if group]


def num_passes(examples: Sequence[Example], tokens_per_pass: int) -> int:
    """How many passes `arrange` makes of one domain's examples."""
    return len(_parts(examples, tokens_per_pass))


def _parts(examples: Sequence[Example], most: int) -> list[tuple[list[Example], int]]:
    """In their order, in parts of at most so many tokens, or of one longer example; with the tokens of each part."""
    parts: list[tuple[list[Example], int]] = []
    for example in examples:
        size = len(example.ids) - 1
        if parts and parts[-1][1] + size <= most:
            part, filled = parts.pop()
            part.append(example)
            parts.append((part, filled + size))
        else:
            parts.append(([example], size))
    return parts


def _pass(group: Sequence[tuple[str, Example]], learn_prompts: bool) -> Pass:
    ids: list[int] = []
    positions: list[int] = []
    labelled: list[int] = []
    labels: list[int] = []
    lengths: list[int] = []
    ends: dict[str, tuple[int, int]] = {}
    for domain, example in group:
        start, length = len(ids), len(example.ids) - 1
        ids += example.ids[:-1]
        positions += range(length)
        first = 1 if learn_prompts else example.num_prompt_tokens
        labelled += range(start + first - 1, start + length)
        labels += example.ids[first:]
        lengths.append(length)
        ends[domain] = (len(ids), len(labelled))
    stretches, labelled_stretches = [], []
    start = labelled_start = 0
    for domain, (end, labelled_end) in ends.items():
        stretches.append(Stretch(domain, start, end))
        labelled_stretches.append(Stretch(domain, labelled_start, labelled_end))
        start, labelled_start = end, labelled_end
    return Pass(
        torch.tensor(ids),
        torch.tensor(positions),
        tuple(lengths),
        tuple(stretches),
        torch.tensor(labelled),
        torch.tensor(labels),
        tuple(labelled_stretches),
    )


class OnePass:
    """A base under the adapters of many domains, attached within `open()`."""

    def __init__(self, model: PreTrainedModel, adapters: GroupedAdapters) -> None:
        self._model, self._adapters = model, adapters
        self._takes_lengths = False
        self._last: _LabelledOnly | None = None

    @contextmanager
    def open(self) -> Iterator[None]:
        """Within, the model is this one's: its weights frozen, its layers the adapters', its attention by documents."""
        wanted = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        layer = self._model.get_decoder().layers[-1]
        feed_forward = getattr(layer, "mlp", None)
        with ExitStack() as stack:
            stack.callback(lambda: [parameter.requires_grad_(True) for parameter in wanted])
            for parameter in wanted:
                parameter.requires_grad_(False)
            stack.enter_context(self._adapters.attached())
            self._takes_lengths = stack.enter_context(documents(self._model))
            if isinstance(feed_forward, nn.Module):
                self._last = layer.mlp = _LabelledOnly(feed_forward, self._adapters)
                stack.callback(setattr, layer, "mlp", feed_forward)
            for name, module in list(self._model.named_modules()):
                if type(module) is nn.RMSNorm and module.elementwise_affine:
                    replace_layer(self._model, name, _FrozenNorm(module))
                    stack.callback(replace_layer, self._model, name, module)
            yield

    def losses(self, batch: Pass) -> Tensor:
        """Loss in nats of each labelled token, [M], each through its own domain's adapter, or none if there is none.

        The pass is taken to where the base lies.
        """
        batch = batch.to(self._model.device)
        if self._last is not None:
            self._last.batch = batch
        with self._adapters.rows(batch.stretches):
            return token_losses(self._model, batch, self._takes_lengths)


def token_losses(model: PreTrainedModel, batch: Pass, takes_lengths: bool) -> Tensor:
    """Loss in nats of each labelled token, [M]; `takes_lengths` is what `documents(model)` said.

    The pass lies where the model does.
    """
    options = {"document_lengths": batch.lengths} if takes_lengths else {}

    def keep_labelled(_: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        return (_picked(given[0], batch.labelled_M),)

    # On the head's way in, so that whatever the model does to its logits afterwards is done, such as scaling them.
    hook = model.get_output_embeddings().register_forward_pre_hook(keep_labelled)
    try:
        inputs = {"input_ids": batch.ids_T[None], "position_ids": batch.positions_T[None]}
        logits_MV = model(**inputs, use_cache=False, **options).logits[0]
    finally:
        hook.remove()
    wide = torch.promote_types(logits_MV.dtype, torch.float32)
    return nn.functional.cross_entropy(logits_MV.to(wide), batch.labels_M, reduction="none")


class _FrozenNorm(nn.Module):
    """An `nn.RMSNorm` whose weights are frozen, on the native kernels where they apply."""

    def __init__(self, norm: nn.RMSNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        if not kernels.can_normalize(x, self.norm.weight):
            out: Tensor = self.norm(x)
            return out
        return kernels.normalize(x, self.norm.weight, self.norm.eps or torch.finfo(x.dtype).eps)


class _LabelledOnly(nn.Module):
    """The last block's feed-forward, on the labelled tokens alone: what it gives the others nobody reads."""

    def __init__(self, feed_forward: nn.Module, adapters: GroupedAdapters) -> None:
        super().__init__()
        self.feed_forward, self._adapters = feed_forward, adapters
        self.batch: Pass | None = None

    def forward(self, x_BTD: Tensor) -> Tensor:
        assert self.batch is not None, "called through OnePass"
        labelled_M = self.batch.labelled_M
        with self._adapters.rows(self.batch.labelled_stretches):
            y_BMD: Tensor = self.feed_forward(_picked(x_BTD, labelled_M))
        out_BTD: Tensor = _PutBack.apply(y_BMD, labelled_M, x_BTD.shape[1])  # type: ignore[no-untyped-call]
        return out_BTD


class _Picked(torch.autograd.Function):
    """Rows of x [B, T, D] that differ from one another: their gradients need no sum, unlike those of an index."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, index_M: Tensor) -> Tensor:
        ctx.save_for_backward(index_M)
        ctx.num_rows = x_BTD.shape[1]
        return x_BTD.index_select(1, index_M)

    @staticmethod
    def backward(ctx: Any, d_out_BMD: Tensor) -> tuple[Tensor, None]:
        (index_M,) = ctx.saved_tensors
        return _put_back(d_out_BMD, index_M, ctx.num_rows), None


class _PutBack(torch.autograd.Function):
    """The other way: rows of zeros but for those."""

    @staticmethod
    def forward(ctx: Any, y_BMD: Tensor, index_M: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(index_M)
        return _put_back(y_BMD, index_M, num_rows)

    @staticmethod
    def backward(ctx: Any, d_out_BTD: Tensor) -> tuple[Tensor, None, None]:
        (index_M,) = ctx.saved_tensors
        return d_out_BTD.index_select(1, index_M), None, None


def _picked(x_BTD: Tensor, index_M: Tensor) -> Tensor:
    out_BMD: Tensor = _Picked.apply(x_BTD, index_M)  # type: ignore[no-untyped-call]
    return out_BMD


def _put_back(rows_BMD: Tensor, index_M: Tensor, num_rows: int) -> Tensor:
    out_BTD = rows_BMD.new_zeros(rows_BMD.shape[0], num_rows, rows_BMD.shape[2])
    return out_BTD.index_copy_(1, index_M, rows_BMD)


def summed_by_domain(values_M: Tensor, batch: Pass) -> dict[str, Tensor]:
    """The sum of the labelled tokens' values in each domain of a pass."""
    return {s.domain: values_M[s.start : s.end].sum() for s in batch.labelled_stretches}
