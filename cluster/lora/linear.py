"""The mixed batch: linear layers that add to each row the delta of that row's own mixture.

`MixedLinear` wraps a base layer; one `MixedBatch` is shared by all layers of a model and says, for the rows of the
step at hand, which adapters are active and with which weights. With none active no LoRA code runs at all. Layers that
read the same input (q, k and v; gate and up) are a site: their A are one product, computed by the first of them.
Letters: T rows, I input width, O output width, C columns, N active adapters, B sequences.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from cluster.lora.delta import mask_columns, mixed_bottleneck
from cluster.lora.weights import AdapterWeights, LinearLayer, adaptable_layers, replace_layer
from cluster.messages import AdapterRef, Mixture

_KEPT_ARRANGEMENTS = 8
"""Stacks of so many sets of adapters are kept: a decode batch and the prefills between its steps come back."""

_SITES = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}


def _site_of(name: str) -> str:
    """The layers that have the same site read the same input."""
    parent, _, layer = name.rpartition(".")
    return f"{parent}.{_SITES.get(layer, layer)}"


@dataclass(frozen=True, slots=True)
class _Layout:
    """Which adapter owns each column, and its scale. Sites whose columns are laid out alike share one."""

    owner_C: Tensor
    scale_C: Tensor


@dataclass(frozen=True, slots=True)
class _Site:
    """A of all active adapters and all layers of a site, one below the other."""

    a_CI: Tensor
    layout: int


@dataclass(frozen=True, slots=True)
class _Layer:
    """B of all active adapters for one layer, and which of its site's columns they read."""

    b_CO: Tensor
    columns: slice


@dataclass(frozen=True, slots=True)
class _Arrangement:
    """A set of adapters, arranged for products: each distinct layout once."""

    sites: dict[str, _Site]
    layers: dict[str, _Layer]
    layouts: list[_Layout]

    @property
    def num_bytes(self) -> int:
        return sum(s.a_CI.nbytes for s in self.sites.values()) + sum(s.b_CO.nbytes for s in self.layers.values())


@dataclass(frozen=True, slots=True)
class _Pass:
    """Rows of a step that share one arrangement of adapters."""

    start: int
    end: int
    arrangement: _Arrangement
    masks_TC: list[Tensor]

    def bottleneck(self, site: str, x_TI: Tensor) -> Tensor | None:
        """Of these rows, [rows, C]; None where no adapter changes the site."""
        if (stack := self.arrangement.sites.get(site)) is None:
            return None
        h_TC = mixed_bottleneck(x_TI[self.start : self.end], stack.a_CI, self.masks_TC[stack.layout])
        return h_TC.to(stack.a_CI.dtype)


@dataclass(frozen=True, slots=True)
class _Bottlenecks:
    """What a site's first layer computed for the others. Holding the input keeps its identity its own."""

    site: str
    x: Tensor
    of_passes: list[Tensor | None]


class MixedBatch:
    """The adapters active in the current step, and each row's weights over them."""

    def __init__(self) -> None:
        self._arrangements: OrderedDict[tuple[AdapterRef, ...], _Arrangement] = OrderedDict()
        self._passes: list[_Pass] = []
        self._last: _Bottlenecks | None = None

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
        self.clear()
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
        self._passes.append(_Pass(start, end, arrangement, masks_TC))

    def clear(self) -> None:
        """The step is over: no rows, and nothing of them is kept."""
        self._passes = []
        self._last = None

    def forget(self, ref: AdapterRef) -> None:
        """Free every stack that holds a copy of this adapter, also the last step's."""
        for refs in [refs for refs in self._arrangements if ref in refs]:
            del self._arrangements[refs]
        self.clear()

    @property
    def stacked_refs(self) -> frozenset[AdapterRef]:
        """The adapters that some stack holds a copy of."""
        return frozenset(ref for refs in self._arrangements for ref in refs)

    @property
    def stacked_bytes(self) -> int:
        """Memory of the stacks: copies, beside the adapters themselves."""
        return sum(kept.num_bytes for kept in self._arrangements.values())

    def add_to(self, name: str, x: Tensor, y: Tensor) -> None:
        """Add to the base's output of layer `name`, in place, what the rows' mixtures say of its input `x`."""
        if not self._passes:
            return
        site = _site_of(name)
        if self._last is None or self._last.site != site or self._last.x is not x:
            x_TI = x.reshape(-1, x.shape[-1])
            self._last = _Bottlenecks(site, x, [rows.bottleneck(site, x_TI) for rows in self._passes])
        y_TO = y.view(-1, y.shape[-1])
        for rows, h_TC in zip(self._passes, self._last.of_passes, strict=True):
            if h_TC is not None and (layer := rows.arrangement.layers.get(name)) is not None:
                y_TO[rows.start : rows.end] += h_TC[:, layer.columns] @ layer.b_CO

    def _arrange(self, refs: tuple[AdapterRef, ...], resident: Mapping[AdapterRef, AdapterWeights]) -> _Arrangement:
        if (kept := self._arrangements.get(refs)) is None:
            kept = _arrangement([resident[ref] for ref in refs])
            self._arrangements[refs] = kept
            if len(self._arrangements) > _KEPT_ARRANGEMENTS:
                self._arrangements.popitem(last=False)
        self._arrangements.move_to_end(refs)
        return kept


def _arrangement(adapters: list[AdapterWeights]) -> _Arrangement:
    sites: dict[str, _Site] = {}
    layers: dict[str, _Layer] = {}
    layouts: dict[tuple[tuple[int, ...], tuple[float, ...]], int] = {}
    names = sorted({name for weights in adapters for name in weights.factors}, key=lambda name: (_site_of(name), name))
    for site, of_site in groupby(names, key=_site_of):
        a_CI: list[Tensor] = []
        owner: list[int] = []
        scale: list[float] = []
        for name in of_site:
            start, b_CO = len(owner), []
            for index, weights in enumerate(adapters):
                if (factors := weights.factors.get(name)) is not None:
                    a_CI.append(factors.a_RI)
                    b_CO.append(factors.b_OR.T)
                    owner += [index] * factors.rank
                    scale += [factors.scale] * factors.rank
            layers[name] = _Layer(torch.cat(b_CO), slice(start, len(owner)))
        layout = layouts.setdefault((tuple(owner), tuple(scale)), len(layouts))
        sites[site] = _Site(torch.cat(a_CI), layout)
    device = next(iter(layers.values())).b_CO.device
    return _Arrangement(
        sites,
        layers,
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
        self.batch.add_to(self.name, x, y)
        return y


def attach_mixed_batch(model: nn.Module) -> MixedBatch:
    """Wrap every adaptable layer of `model` in place and return the batch that steers them all."""
    assert not any(isinstance(module, MixedLinear) for module in model.modules()), "a model has one mixed batch"
    batch = MixedBatch()
    for name, linear in adaptable_layers(model).items():
        replace_layer(model, name, MixedLinear(name, linear, batch))
    return batch
