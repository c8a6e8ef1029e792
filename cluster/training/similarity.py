"""How alike adapters are in what they do: the deltas' outputs on inputs that the base's layers really get.

Factors may differ and do the same (B A = B M M^-1 A), and directions that no input has do not matter; so deltas are
compared by their outputs, each layer's beside the length of its own. Letters: N adapters, S inputs, I and O widths.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cluster.lora.weights import AdapterWeights, adaptable_layers
from cluster.model.base import Base
from cluster.training.data import Row, collate, encode
from cluster.training.stage_adapters import padding_id

_ROWS_PER_BATCH = 8
_MOST_NUMBERS = 2**26
"""Of all adapters' outputs of one layer: 256 MB."""


@torch.inference_mode()
def functional_products(
    base: Base, adapters: Sequence[AdapterWeights], rows: Sequence[Row], max_tokens: int, num_inputs: int = 256
) -> Tensor:
    """Products of every two adapters' outputs on at most `num_inputs` positions of `rows`, all layers together [N, N].

    Linear in either adapter: the products of a weighted sum are the weighted sums of these.
    """
    products_NN = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for name, (x_SI, length) in _inputs(base, rows, max_tokens, num_inputs).items():
        changing = [number for number, adapter in enumerate(adapters) if name in adapter.factors]
        if not changing:
            continue
        width = adapters[changing[0]].factors[name].b_OR.shape[0]
        x_SI = x_SI[: max(1, _MOST_NUMBERS // (len(changing) * width))]
        outputs = torch.stack([_delta(adapters[number], name, x_SI).flatten() for number in changing])
        of_layer = (outputs @ outputs.T).double() / (length**2 * len(x_SI))
        products_NN[torch.tensor(changing)[:, None], torch.tensor(changing)] += of_layer
    return products_NN


def cosine(products_NN: Tensor, one_N: Tensor, other_N: Tensor) -> float:
    """Of two weighted sums of adapters, 1 where they do the same but for a factor; 0 where one does nothing."""
    squares = float((one_N @ products_NN @ one_N) * (other_N @ products_NN @ other_N))
    return float(one_N @ products_NN @ other_N) / squares**0.5 if squares > 0 else 0.0


def _delta(adapter: AdapterWeights, name: str, x_SI: Tensor) -> Tensor:
    factors = adapter.factors[name]
    return (x_SI @ factors.a_RI.T @ factors.b_OR.T) * factors.scale


def _inputs(base: Base, rows: Sequence[Row], max_tokens: int, num_inputs: int) -> Mapping[str, tuple[Tensor, float]]:
    """Of each layer: inputs, drawn from all positions of `rows` [S, I], and the mean length of its outputs on them."""
    examples = encode(base.tokenizer, rows, max_tokens)
    per_batch = max(1, num_inputs // max(1, -(-len(rows) // _ROWS_PER_BATCH)))
    generator = torch.Generator().manual_seed(0)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for start in range(0, len(rows), _ROWS_PER_BATCH):
        part = examples[start : start + _ROWS_PER_BATCH]
        batch = collate([[example] for example in part], padding_id(base.tokenizer), learn_prompts=False)
        real = torch.tensor([position < len(e.ids) - 1 for e in part for position in range(batch.ids_BT.shape[1])])
        drawn_S = real.nonzero()[:, 0][torch.randperm(int(real.sum()), generator=generator)[:per_batch]]
        with _recorded(base.model, drawn_S, seen):
            base.model.get_decoder()(input_ids=batch.ids_BT, position_ids=batch.positions_BT, use_cache=False)
    joined = {name: [torch.cat(parts) for parts in zip(*pairs, strict=True)] for name, pairs in seen.items()}
    return {name: (x_SI, float(y_SO.norm(dim=1).mean())) for name, (x_SI, y_SO) in joined.items()}


@contextmanager
def _recorded(model: nn.Module, drawn_S: Tensor, seen: dict[str, list[tuple[Tensor, Tensor]]]) -> Iterator[None]:
    """Inputs and outputs of each layer at the drawn positions are added to `seen`."""

    def record(name: str) -> Any:
        def hook(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            x_SI, y_SO = given[0].flatten(0, -2)[drawn_S].float(), output.flatten(0, -2)[drawn_S].float()
            seen.setdefault(name, []).append((x_SI, y_SO))

        return hook

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(record(name)) for name in adaptable_layers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
