"""The cost model against what merging does: the bytes it sends, the flops it computes, and choices by hand."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cluster.lora.merge_plan import LayerShares, Machine, Method, choose, cost, crossover, exact_method, plan
from cluster.lora.merging import merge_parts, reduce_share, share_sums
from cluster.lora.packed_adapter import TENSORS_FILE, pack
from cluster.lora.parts import LayerProjection, Scaled
from cluster.lora.peft_format import save
from cluster.lora.sketching import Multiply, Project, Sketch, merge_by_sketch
from cluster.lora.weights import AdapterWeights, Factors
from deployments.shards.mixture_share import Share
from tests.lora.mixtures import FINGERPRINT, LAYER, adapter


def _counter() -> FlopCounterMode:
    """Counts products added in place too, which torch's own does not."""

    def addmm_flops(_: list[int], x_shape: list[int], y_shape: list[int], **__: object) -> int:
        return 2 * x_shape[0] * x_shape[1] * y_shape[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops})


def _share(num_out: int, num_in: int, columns: int) -> list[AdapterWeights]:
    return [adapter(torch.randn(8, num_in), torch.randn(num_out, 8)) for _ in range(columns // 8)]


def _num_bytes(message: object) -> int:
    """What an ask or an answer of the sketch carries."""
    if isinstance(message, Sketch):
        return 0
    if isinstance(message, Multiply):
        return sum(array.nbytes for array in message.by.values())
    if isinstance(message, Project):
        return message.q_ML[LAYER].nbytes + message.p_NJ[LAYER].nbytes
    assert isinstance(message, dict)
    answer = message[LAYER]
    arrays = [answer] if isinstance(answer, Scaled) else [answer.z_NL, answer.g_MJ]
    return sum(scaled.array.nbytes for scaled in arrays)


def _by_sketch(shares: Sequence[list[AdapterWeights]], rank: int) -> tuple[int, int]:
    """Bytes that travel, and flops of the products of the shard that has most to do."""
    flops = [0] * len(shares)
    sums = []
    for index, share in enumerate(shares):
        with _counter() as counter:
            sums.append(dict(share_sums(share, [1.0] * len(share))))
        flops[index] += counter.get_total_flops()
    rounds, num_bytes = merge_by_sketch(FINGERPRINT, rank, torch.float32, 0), 0
    ask = next(rounds)
    while True:
        answers: list[dict[str, Scaled] | dict[str, LayerProjection]] = []
        for index, of_shard in enumerate(sums):
            with _counter() as counter:
                answers.append(ask.answer(of_shard))
            flops[index] += counter.get_total_flops()
            num_bytes += _num_bytes(ask) + _num_bytes(answers[-1])
        try:
            ask = rounds.send(answers)
        except StopIteration:
            return num_bytes, max(flops)


SHAPES = [(120, 200), (200, 120), (160, 160)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("columns", [(8, 24), (80, 160), (40, 16), (8, 72)])
def test_the_bytes_of_the_exact_ways_are_those_sent(shape: tuple[int, int], columns: tuple[int, ...]) -> None:
    shares = LayerShares(*shape, columns)
    dense = [LAYER] if exact_method(shares) is Method.DENSE_SUM else []
    parts = [reduce_share(_share(*shape, each), [1.0] * (each // 8), dense=dense) for each in columns]
    assert cost(exact_method(shares), shares, 16).num_bytes == sum(part.num_bytes for part in parts)
    assert merge_parts(parts, 16, torch.float32).certificate.method == exact_method(shares).value


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("columns", [(16, 40), (160, 240)])
def test_bytes_and_flops_of_a_sketch_are_those_sent_and_computed(
    shape: tuple[int, int], columns: tuple[int, ...]
) -> None:
    expected = cost(Method.RANDOMIZED, LayerShares(*shape, columns), 8)
    num_bytes, flops = _by_sketch([_share(*shape, each) for each in columns], 8)
    assert expected.num_bytes == num_bytes
    assert expected.shard_flops == pytest.approx(flops, rel=0.02)


@pytest.mark.parametrize("shape", SHAPES)
def test_flops_of_a_shard_s_matrix_are_those_computed(shape: tuple[int, int]) -> None:
    shares = LayerShares(*shape, (160, 240))
    with _counter() as counter:
        reduce_share(_share(*shape, 240), [1.0] * 30)
    assert cost(Method.DENSE_SUM, shares, 16).shard_flops == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_factors_travel_until_they_are_larger_than_the_matrix() -> None:
    assert crossover(896, 896) == 448
    assert crossover(4864, 896) == 757
    assert exact_method(LayerShares(896, 896, (200, 247))) is Method.QR_SVD
    assert exact_method(LayerShares(896, 896, (200, 248))) is Method.DENSE_SUM


def test_a_sketch_is_chosen_for_wide_layers_and_many_shards_only() -> None:
    many = (8000 // 8,) * 8
    assert choose(LayerShares(896, 896, many), 64) is Method.DENSE_SUM
    assert choose(LayerShares(8192, 8192, many), 64) is Method.RANDOMIZED
    assert choose(LayerShares(8192, 8192, (8, 16)), 64) is Method.QR_SVD
    assert choose(LayerShares(8192, 8192, many), 8192) is Method.DENSE_SUM


def test_the_plan_is_each_layer_s_choice_from_what_all_shards_hold_of_it(tmp_path: Path) -> None:
    first, second = _share(24, 40, 16), _share(24, 40, 8)
    extra = AdapterWeights({"other": Factors(torch.zeros(3, 40), torch.zeros(24, 3), 1.0)}, FINGERPRINT)
    sizes = []
    for number, adapters in enumerate((first, [*second, extra])):
        folders = [tmp_path / f"{number}-{index}" for index in range(len(adapters))]
        for folder, weights in zip(folders, adapters, strict=True):
            folder.mkdir()
            save(folder, weights, "nano")
        packed = [pack(folder) for folder in folders]
        sizes.append(Share([folder / TENSORS_FILE for folder in folders], packed, [1.0] * len(packed)).sizes())
    assert sizes[0] == {LAYER: LayerShares(24, 40, (16,))}
    assert sizes[1] == {LAYER: LayerShares(24, 40, (8,)), "other": LayerShares(24, 40, (3,))}
    assert plan(sizes, 4) == {LAYER: Method.DENSE_SUM, "other": Method.QR_SVD}


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_time_is_flops_bytes_and_rounds_one_after_the_other(scale: float) -> None:
    price: Callable[[Machine], float] = cost(Method.RANDOMIZED, LayerShares(512, 512, (900, 900)), 16).seconds
    fast = Machine(2e10 * scale, 1e9 * scale, 2e-3 / scale)
    assert price(fast) == pytest.approx(price(Machine()) / scale)
