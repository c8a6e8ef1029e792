"""The mixed batch: linear layers that add to each row the delta of that row's own mixture.

`MixedLinear` wraps a base layer; one `MixedBatch` is shared by all layers of a model and says, for the rows of the
step at hand, which adapters are active and with which weights. With none active no LoRA code runs at all.
Letters: T rows, I input width, O output width, C columns, N active adapters, B sequences.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cluster.lora.delta import mask_columns, mixed_delta
from cluster.lora.weights import AdapterWeights, adaptable_layers
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


class MixedBatch:
    """The adapters active in the current step, and each row's weights over them."""

    def __init__(self) -> None:
        self._arrangements: OrderedDict[tuple[AdapterRef, ...], _Arrangement] = OrderedDict()
        self._stacks: dict[str, _Stack] = {}
        self._masks_TC: list[Tensor] = []

    def set_rows(
        self, mixtures: Sequence[Mixture], tokens_per_row: int, resident: Mapping[AdapterRef, AdapterWeights]
    ) -> None:
        """Say which mixture each sequence of the next forward pass has; each ref must be in `resident`.

        A sequence is `tokens_per_row` rows of every layer's input. The cost of the step follows the adapters named
        here, not those resident. Arranging a new set of adapters copies their bytes; a set seen lately does not.
        """
        refs = tuple(sorted({ref for mixture in mixtures for ref in mixture.refs}))
        if not refs:
            self._clear()
            return
        arrangement = self._arrange(refs, resident)
        # From lists: an entry beyond fp32 becomes infinity, which is that row's own error, where assigning it raises.
        rows = [[weights.get(ref, 0.0) for ref in refs] for weights in (dict(mixture.entries) for mixture in mixtures)]
        weights_TN = torch.tensor(rows, dtype=torch.float32, device=arrangement.layouts[0].owner_C.device)
        if len(mixtures) > 1:  # a single row serves all its tokens by broadcasting
            weights_TN = weights_TN.repeat_interleave(tokens_per_row, dim=0)
        self._stacks = arrangement.stacks
        self._masks_TC = [mask_columns(weights_TN, layout.owner_C, layout.scale_C) for layout in arrangement.layouts]

    def forget(self, ref: AdapterRef) -> None:
        """Free every stack that holds a copy of this adapter, also the last step's."""
        for refs in [refs for refs in self._arrangements if ref in refs]:
            del self._arrangements[refs]
        self._clear()

    @property
    def stacked_refs(self) -> frozenset[AdapterRef]:
        """The adapters that some stack holds a copy of."""
        return frozenset(ref for refs in self._arrangements for ref in refs)

    @property
    def stacked_bytes(self) -> int:
        """Memory of the stacks: copies, beside the adapters themselves."""
        stacks = [stack for kept in self._arrangements.values() for stack in kept.stacks.values()]
        return sum(stack.a_CI.nbytes + stack.b_CO.nbytes for stack in stacks)

    def delta(self, name: str, x_TI: Tensor) -> Tensor | None:
        """What to add to the base's output of layer `name`, shape [T, O]; None when no active adapter changes it."""
        if (stack := self._stacks.get(name)) is None:
            return None
        return mixed_delta(x_TI, stack.a_CI, stack.b_CO, self._masks_TC[stack.layout])

    def _clear(self) -> None:
        self._stacks, self._masks_TC = {}, []

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

    def __init__(self, name: str, base: nn.Linear, batch: MixedBatch) -> None:
        super().__init__()
        self.name = name
        self.base = base
        self.batch = batch

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        delta_TO = self.batch.delta(self.name, x.reshape(-1, x.shape[-1]))
        return y if delta_TO is None else y + delta_TO.view(y.shape).to(y.dtype)


def attach_mixed_batch(model: nn.Module) -> MixedBatch:
    """Wrap every adaptable layer of `model` in place and return the batch that steers them all."""
    assert not any(isinstance(module, MixedLinear) for module in model.modules()), "a model has one mixed batch"
    batch = MixedBatch()
    for name, linear in adaptable_layers(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, MixedLinear(name, linear, batch))
    return batch
