"""Merging mixtures of many adapters: seconds, bytes, error against the exact optimum, and what the certificate says.

Adapters are random, with spectra like trained ones': they share directions, each less than the one before it. Nothing
is sent: every shard's work is done in turn in this process and timed alone, as if each had a machine of its own.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.figures import Measurement, Measurements
from benchmarks.random_model import SHAPES
from cluster.lora.certificate import in_total
from cluster.lora.merge_plan import LayerShares, Method, choose, exact_method
from cluster.lora.merging import Merged, merge_parts, reduce_share, share_sums
from cluster.lora.parts import Scaled
from cluster.lora.sketching import Answer, Ask, Multiply, Project, Sums, merge_by_sketch
from cluster.lora.weights import AdapterWeights, Factors, adaptable_layers
from cluster.model import ZephyraFusionConfig, ZephyraFusionForCausalLM
from cluster.model.configuration_zephyra import SIZES

DECAY = 0.5
"""The j-th direction that adapters share is weaker than the first by j to this power, on either side."""

_RANK = 8
"""Of each adapter."""
_FINGERPRINT = "random"
_SEED = 0
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Mixing:
    """What is merged."""

    model: str
    num_adapters: int
    rank: int
    """Of what is served."""
    num_blocks: int
    """Blocks of the model that are merged; all of them have the same shapes."""
    shards: tuple[int, ...]


FULL = (
    Mixing("387m", 1000, 64, 24, (1, 2, 4, 8)),
    Mixing("387m", 32, 64, 24, (4,)),
    Mixing("starter", 1000, 16, 4, (1, 2, 4, 8)),
    Mixing("starter", 6, 16, 4, (2,)),
)
QUICK = (Mixing("tiny", 40, 8, 1, (1, 2)), Mixing("tiny", 5, 8, 1, (2,)))


@dataclass(frozen=True, slots=True)
class Way:
    """How a mixture is merged."""

    name: str
    num_shards: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.name}, {str(self.dtype).removeprefix('torch.')}"


@dataclass(slots=True)
class Tally:
    """What one way of merging took and gave, all layers together."""

    shard_s: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    coordinator_s: float = 0.0
    num_bytes: int = 0
    merged: list[Merged] = field(default_factory=list)
    error_squares: float = 0.0
    optimum_squares: float = 0.0
    violations: int = 0

    @property
    def seconds(self) -> float:
        """Of the slowest shard and then of the coordinator."""
        return max(self.shard_s.values()) + self.coordinator_s

    @property
    def over_optimum(self) -> float:
        """The error against the least that the rank allows."""
        return math.sqrt(self.error_squares / self.optimum_squares)

    def on_shard(self, shard: int, work: Callable[[], T]) -> T:
        """Do `work`, timed as that shard's."""
        start_s = time.perf_counter()
        result = work()
        self.shard_s[shard] += time.perf_counter() - start_s
        return result

    def on_coordinator(self, work: Callable[[], T]) -> T:
        """Do `work`, timed as the coordinator's."""
        start_s = time.perf_counter()
        result = work()
        self.coordinator_s += time.perf_counter() - start_s
        return result


def merging(mixings: Sequence[Mixing], console: Console, done: Callable[[str], None]) -> Measurements:
    """Merge all of `mixings` in every way, print a table of each, and give the figures that they hold in short."""
    tallies: list[tuple[Way, Tally]] = []
    for mixing in mixings:
        of_mixing = _merge_all(mixing, done)
        _print(mixing, of_mixing, console)
        tallies += of_mixing.items()
    return _figures(tallies)


def _figures(tallies: Sequence[tuple[Way, Tally]]) -> Measurements:
    exact = [tally.over_optimum for way, tally in tallies if way == Way("exact", way.num_shards, torch.float32)]
    randomized = [tally.over_optimum for way, tally in tallies if way.name == "randomized"]
    return {
        "merge_exact_over_optimum": Measurement((max(exact),)),
        "merge_random_over_optimum": Measurement((max(randomized),)),
        "certificate_violations": Measurement((float(sum(tally.violations for _, tally in tallies)),)),
    }


def _merge_all(mixing: Mixing, done: Callable[[str], None]) -> dict[Way, Tally]:
    tallies: dict[Way, Tally] = defaultdict(Tally)
    shapes = _shapes(mixing.model)
    generator = torch.Generator().manual_seed(_SEED)
    for block in range(mixing.num_blocks):
        for name, shape in shapes.items():
            layer = f"model.layers.{block}.{name}"
            adapters = [_adapter(layer, shape, generator) for _ in range(mixing.num_adapters)]
            weights = (torch.randint(1, 9, (mixing.num_adapters,), generator=generator) / 64).tolist()
            truth_OI = _dense([adapter.factors[layer] for adapter in adapters], weights)
            tail = torch.linalg.svdvals(truth_OI)[mixing.rank :]
            for num_shards in mixing.shards:
                shares = [(adapters[s::num_shards], weights[s::num_shards]) for s in range(num_shards)]
                _merge_layer(mixing, layer, shares, truth_OI, float(tail.square().sum()), tallies)
            done(layer)
    return tallies


def _merge_layer(
    mixing: Mixing,
    layer: str,
    shares: Sequence[tuple[list[AdapterWeights], list[float]]],
    truth_OI: Tensor,
    optimum_squares: float,
    tallies: dict[Way, Tally],
) -> None:
    """In all ways that are shown for so many shards; the narrower formats where there are most of them."""
    ways: list[tuple[str, torch.dtype]] = [("exact", torch.float32), ("tree", torch.float32)]
    if mixing.num_adapters * _RANK > 2 * mixing.rank:
        ways.append(("randomized", torch.float32))
    if len(shares) == max(mixing.shards):
        ways.append(("exact", torch.bfloat16))
    for name, dtype in ways:
        tally = tallies[Way(name, len(shares), dtype)]
        if name == "randomized":
            merged = _randomized(shares, mixing.rank, dtype, tally)
        else:
            merged = _by_parts(shares, mixing.rank, dtype, 2 * mixing.rank if name == "tree" else None, tally)
        f = merged.weights.factors[layer]
        error = float(torch.linalg.norm(truth_OI - f.scale * (f.b_OR.double() @ f.a_RI.double())))
        tally.merged.append(merged)
        tally.error_squares += error**2
        tally.optimum_squares += optimum_squares
        tally.violations += error > merged.certificate.bound


def _by_parts(
    shares: Sequence[tuple[list[AdapterWeights], list[float]]],
    rank: int,
    dtype: torch.dtype,
    most_columns: int | None,
    tally: Tally,
) -> Merged:
    (layer, f), *_ = shares[0][0][0].factors.items()
    columns = tuple(len(adapters) * _RANK for adapters, _ in shares)
    method = exact_method(LayerShares(f.b_OR.shape[0], f.a_RI.shape[1], columns))
    dense = [layer] if method is Method.DENSE_SUM else []
    work = partial(reduce_share, most_columns=most_columns, dense=dense)
    parts = [tally.on_shard(shard, partial(work, *share)) for shard, share in enumerate(shares)]
    tally.num_bytes += sum(part.num_bytes for part in parts)
    return tally.on_coordinator(lambda: merge_parts(parts, rank, dtype))


def _randomized(
    shares: Sequence[tuple[list[AdapterWeights], list[float]]], rank: int, dtype: torch.dtype, tally: Tally
) -> Merged:
    sums = [tally.on_shard(shard, partial(_sums, *share)) for shard, share in enumerate(shares)]
    rounds = merge_by_sketch(_FINGERPRINT, rank, dtype, _SEED)
    ask = next(rounds)
    while True:
        answers = [tally.on_shard(shard, partial(_answer, ask, of_shard)) for shard, of_shard in enumerate(sums)]
        tally.num_bytes += _asked_bytes(ask) * len(shares) + sum(_answered_bytes(answer) for answer in answers)
        try:
            ask = tally.on_coordinator(partial(rounds.send, answers))
        except StopIteration as end:
            merged: Merged = end.value
            return merged


def _sums(adapters: Sequence[AdapterWeights], weights: Sequence[float]) -> Sums:
    return dict(share_sums(adapters, weights))


def _answer(ask: Ask, sums: Sums) -> Answer:
    return ask.answer(sums)


def _asked_bytes(ask: Ask) -> int:
    if isinstance(ask, Multiply):
        return sum(array.nbytes for array in ask.by.values())
    if isinstance(ask, Project):
        return sum(array.nbytes for arrays in (ask.q_ML, ask.p_NJ) for array in arrays.values())
    return 0


def _answered_bytes(answer: Answer) -> int:
    return sum(of.array.nbytes if isinstance(of, Scaled) else of.num_bytes for of in answer.values())


def _shapes(model: str) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the layers of one block, by name within it."""
    with torch.device("meta"):
        if model == "starter":
            base: torch.nn.Module = ZephyraFusionForCausalLM(ZephyraFusionConfig(**SIZES["starter"]))
        else:
            shape = SHAPES[model]
            config = Qwen2Config(
                hidden_size=shape.hidden_size,
                intermediate_size=shape.intermediate_size,
                num_hidden_layers=1,
                num_attention_heads=shape.num_heads,
                num_key_value_heads=shape.num_kv_heads,
                vocab_size=shape.vocab_size,
            )
            base = Qwen2ForCausalLM(config)
    layers = {name.partition(".0."): layer for name, layer in adaptable_layers(base).items()}
    return {name: (layer.out_features, layer.in_features) for (_, found, name), layer in layers.items() if found}


def _adapter(layer: str, shape: tuple[int, int], generator: torch.Generator) -> AdapterWeights:
    out_sizes_O, in_sizes_I = ((torch.arange(width) + 1.0) ** -DECAY for width in shape)
    a_RI = torch.randn(_RANK, shape[1], generator=generator) * in_sizes_I
    b_OR = torch.randn(shape[0], _RANK, generator=generator) * out_sizes_O[:, None] * 0.02
    return AdapterWeights({layer: Factors(a_RI.bfloat16(), b_OR.bfloat16(), scale=2.0)}, _FINGERPRINT)


def _dense(factors: Sequence[Factors], weights: Sequence[float]) -> Tensor:
    """The exact sum, but for float64's rounding."""
    b_OC = torch.cat([f.b_OR.double() * (w * f.scale) for f, w in zip(factors, weights, strict=True)], dim=1)
    return b_OC @ torch.cat([f.a_RI.double() for f in factors])


def _print(mixing: Mixing, tallies: Mapping[Way, Tally], console: Console) -> None:
    table = Table(
        title=f"{mixing.num_adapters:,} adapters of rank {_RANK} merged to {mixing.rank}: {mixing.num_blocks} blocks "
        f"of {mixing.model}, directions fade as j^-{DECAY:g}, threads: {torch.get_num_threads()}",
        title_justify="left",
        caption=f"the cost model's choice for S = {max(mixing.shards)}: {_chosen(mixing)}",
        caption_justify="left",
    )
    for name in ("way", "S", "seconds", "of shard", "MB", "error/least", "bound/error", "kept"):
        table.add_column(name, justify="left" if name == "way" else "right", no_wrap=True)
    for way, tally in sorted(tallies.items(), key=lambda pair: (str(pair[0]), pair[0].num_shards)):
        table.add_row(*_cells(way, tally))
    console.print(table)


def _cells(way: Way, tally: Tally) -> tuple[str, ...]:
    total = in_total(certificate for merged in tally.merged for certificate in merged.certificates.values())
    return (
        str(way),
        str(way.num_shards),
        f"{tally.seconds:.2f}",
        f"{max(tally.shard_s.values()):.2f}",
        f"{tally.num_bytes / 1e6:,.1f}",
        f"{tally.over_optimum:.7f}",
        f"{total.bound / math.sqrt(tally.error_squares):.4f}",
        f"{total.kept_energy:.4f}",
    )


def _chosen(mixing: Mixing) -> str:
    """What the cost model would choose, by layer, for the most shards."""
    num_shards = max(mixing.shards)
    columns = (mixing.num_adapters * _RANK // num_shards,) * num_shards
    names = {
        name.rpartition(".")[2]: choose(LayerShares(*shape, columns), mixing.rank).value
        for name, shape in _shapes(mixing.model).items()
    }
    return ", ".join(f"{name} {method}" for name, method in names.items())
