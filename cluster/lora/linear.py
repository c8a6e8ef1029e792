"""The mixed batch: linear layers that add to each row the delta of that row's own mixture.

`MixedLinear` wraps a base layer; one `MixedBatch` is shared by all layers of a model and says, for the rows of the
step at hand, which adapters are active and with which weights. With none active no LoRA code runs at all.
Letters: T rows, I input width, O output width, C columns, N active adapters, B sequences.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from cluster.lora.delta import mask_columns, mixed_delta
from cluster.lora.weights import AdapterWeights, LinearLayer, adaptable_layers
from cluster.messages import AdapterRef, Mixture

_KEPT_ARRANGEMENTS = 8
"""Stacks of so many sets of adapters are kept: a decode batch and the prefills between its steps come back."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """Which adapter owns each column, and its scale. Layers whose columns are laid out alike share one."""

    owner_C: Tensor
    scale_C: Tensor


@dataclass(frozen=True, slots=True)
class _Stack:
    """The factors of all active adapters for one layer, side by side."""

    a_CI: Tensor
    b_CO: Tensor
    layout: int


@dataclass(frozen=True, slots=True)
class _Arrangement:
    """A set of adapters, arranged for products: one stack per layer, each distinct layout once."""

    stacks: dict[str, _Stack]
    layouts: list[_Layout]


@dataclass(frozen=True, slots=True)
class _Pass:
    """Rows of a step that share one stack of adapters."""

    start: int
    end: int
    stacks: dict[str, _Stack]
    masks_TC: list[Tensor]


class MixedBatch:
    """The adapters active in the current step, and each row's weights over them."""

    def __init__(self) -> None:
        self._arrangements: OrderedDict[tuple[AdapterRef, ...], _Arrangement] = OrderedDict()
        self._passes: list[_Pass] = []

    def set_rows(
        self,
        mixtures: Sequence[Mixture],
        lengths: Sequence[int],
        resident: Mapping[AdapterRef, AdapterWeights],
    ) -> None:
        """Say which mixture each sequence of the next forward pass has; each ref must be in `resident`.

        A sequence is as many rows of every layer's input as `lengths` says, one after the other. Those of one row come
        first and share a stack; a longer one meets its own mixture's columns only. The cost of the step follows the
        adapters named here, not those resident. A new set of adapters is copied; a set seen lately is not.
        """
        self._passes = []
        num_single = next((index for index, length in enumerate(lengths) if length > 1), len(lengths))
        assert all(length > 1 for length in lengths[num_single:]), "single rows come first"
        self._add_pass(mixtures[:num_single], 0, num_single, resident)
        start = num_single
        longer = zip(mixtures[num_single:], lengths[num_single:], strict=True)
        for mixture, neighbours in groupby(longer, key=lambda pair: pair[0]):
            end = start + sum(length for _, length in neighbours)
            self._add_pass([mixture], start, end, resident)
            start = end

    def _add_pass(
        self, mixtures: Sequence[Mixture], start: int, end: int, resident: Mapping[AdapterRef, AdapterWeights]
    ) -> None:
        refs = tuple(sorted({ref for mixture in mixtures for ref in mixture.refs}))
        if not refs:
            return
        arrangement = self._arrange(refs, resident)
        # From lists: an entry beyond fp32 becomes infinity, which is that row's own error, where assigning it raises.
        rows = [[weights.get(ref, 0.0) for ref in refs] for weights in (dict(mixture.entries) for mixture in mixtures)]
        # A single mixture serves all its rows by broadcasting.
        weights_TN = torch.tensor(rows, dtype=torch.float32, device=arrangement.layouts[0].owner_C.device)
        masks_TC = [mask_columns(weights_TN, layout.owner_C, layout.scale_C) for layout in arrangement.layouts]
        self._passes.append(_Pass(start, end, arrangement.stacks, masks_TC))

    def forget(self, ref: AdapterRef) -> None:
        """Free every stack that holds a copy of this adapter, also the last step's."""
        for refs in [refs for refs in self._arrangements if ref in refs]:
            del self._arrangements[refs]
        self._passes = []

    @property
    def stacked_refs(self) -> frozenset[AdapterRef]:
        """The adapters that some stack holds a copy of."""
        return frozenset(ref for refs in self._arrangements for ref in refs)

    @property
    def stacked_bytes(self) -> int:
        """Memory of the stacks: copies, beside the adapters themselves."""
        stacks = [stack for kept in self._arrangements.values() for stack in kept.stacks.values()]
        return sum(stack.a_CI.nbytes + stack.b_CO.nbytes for stack in stacks)

    def add_to(self, name: str, x_TI: Tensor, y_TO: Tensor) -> None:
        """Add to the base's output of layer `name`, in place, what the rows' mixtures say."""
        for rows in self._passes:
            if (stack := rows.stacks.get(name)) is not None:
                part = slice(rows.start, rows.end)
                delta_TO = mixed_delta(x_TI[part], stack.a_CI, stack.b_CO, rows.masks_TC[stack.layout])
                y_TO[part] += delta_TO.to(y_TO.dtype)

    def _arrange(self, refs: tuple[AdapterRef, ...], resident: Mapping[AdapterRef, AdapterWeights]) -> _Arrangement:
        if (kept := self._arrangements.get(refs)) is None:
            kept = _arrangement([resident[ref] for ref in refs])
            self._arrangements[refs] = kept
            if len(self._arrangements) > _KEPT_ARRANGEMENTS:
                self._arrangements.popitem(last=False)
        self._arrangements.move_to_end(refs)
        return kept


def _arrangement(adapters: list[AdapterWeights]) -> _Arrangement:
    stacks: dict[str, _Stack] = {}
    layouts: dict[tuple[tuple[int, ...], tuple[float, ...]], int] = {}
    for name in sorted({name for weights in adapters for name in weights.factors}):
        present = [(index, weights.factors[name]) for index, weights in enumerate(adapters) if name in weights.factors]
        owner = tuple(index for index, f in present for _ in range(f.rank))
        scale = tuple(f.scale for _, f in present for _ in range(f.rank))
        stacks[name] = _Stack(
            a_CI=torch.cat([f.a_RI for _, f in present]),
            b_CO=torch.cat([f.b_OR.T for _, f in present]),
            layout=layouts.setdefault((owner, scale), len(layouts)),
        )
    device = next(iter(stacks.values())).a_CI.device
    return _Arrangement(
        stacks,
        [_Layout(torch.tensor(o, device=device), torch.tensor(s, device=device)) for o, s in layouts],
    )


class MixedLinear(nn.Module):
    """A base layer plus, for each row, the delta of its mixture."""

    def __init__(self, name: str, base: LinearLayer, batch: MixedBatch) -> None:
        super().__init__()
        self.name = name
        self.base = base
        self.batch = batch

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        self.batch.add_to(self.name, x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1]))
        return y


def attach_mixed_batch(model: nn.Module) -> MixedBatch:
    """Wrap every adaptable layer of `model` in place and return the batch that steers them all."""
    assert not any(isinstance(module, MixedLinear) for module in model.modules()), "a model has one mixed batch"
    batch = MixedBatch()
    for name, linear in adaptable_layers(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, MixedLinear(name, linear, batch))
    return batch
