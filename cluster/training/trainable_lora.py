"""Adapters in training through soft mixtures: each sequence of a batch goes through its own mixture of all domains.

The forward pass is the one that serving uses, with gradients, which reach the weights of the mixtures too. Letters:
B sequences, N domains, T rows, I and O widths, R rank, C columns.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cluster.lora.delta import mask_columns, mixed_delta
from cluster.lora.weights import AdapterWeights, Factors, LinearLayer, adaptable_layers, replace_layer


class _LoraLinear(nn.Module):
    """A frozen layer and the factors of the domains that change it, by their numbers."""

    def __init__(self, base: LinearLayer, factors: Mapping[int, Factors], device: torch.device) -> None:
        super().__init__()
        self.base = base
        self.places = {domain: place for place, domain in enumerate(factors)}
        """Where a domain's factors stand in `a`, `b` and `scales`."""
        self.a = nn.ParameterList(f.a_RI.to(device, copy=True) for f in factors.values())
        self.b = nn.ParameterList(f.b_OR.to(device, copy=True) for f in factors.values())
        self.scales = [f.scale for f in factors.values()]
        columns = [(domain, f.scale) for domain, f in factors.items() for _ in range(f.rank)]
        self._owner_C = torch.tensor([domain for domain, _ in columns], dtype=torch.int64).to(device)
        self._scale_C = torch.tensor([scale for _, scale in columns]).to(device)
        self.domain: int | None = None
        self.weights_TN: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if self.domain in self.places:
            place = self.places[self.domain]
            delta: Tensor = x @ self.a[place].T @ self.b[place].T
            return y + delta * self.scales[place]
        if self.weights_TN is not None and self.places:
            a_CI, b_CO = torch.cat(list(self.a)), torch.cat([b.T for b in self.b])
            mask_TC = mask_columns(self.weights_TN, self._owner_C, self._scale_C)
            return y + mixed_delta(x.reshape(-1, x.shape[-1]), a_CI, b_CO, mask_TC).view(y.shape)
        return y


class TrainableAdapters:
    """One adapter per domain, attached to `model` in place. The factors are trained; the rest is left as it was."""

    def __init__(self, model: PreTrainedModel, adapters: Mapping[str, AdapterWeights]) -> None:
        self.domains = tuple(adapters)
        self._model = model
        self._layers: dict[str, _LoraLinear] = {}
        for name, linear in adaptable_layers(model).items():
            every = enumerate(adapters.values())
            chosen = {index: weights.factors[name] for index, weights in every if name in weights.factors}
            self._layers[name] = _LoraLinear(linear, chosen, model.device)
            replace_layer(model, name, self._layers[name])

    def parameters(self, domain: str) -> dict[str, nn.Parameter]:
        """The factors of one domain, by name."""
        return {
            f"{name}.{side}": factors[place]
            for name, layer, place in self._of(domain)
            for side, factors in (("a", layer.a), ("b", layer.b))
        }

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """All of the model's parameters but the factors, by name."""
        factors = {id(p) for layer in self._layers.values() for p in (*layer.a, *layer.b)}
        return {name: p for name, p in self._model.named_parameters() if id(p) not in factors}

    @contextmanager
    def detached(self) -> Iterator[None]:
        """Within, the model is the plain base."""
        for name, layer in self._layers.items():
            replace_layer(self._model, name, layer.base)
        try:
            yield
        finally:
            for name, layer in self._layers.items():
                replace_layer(self._model, name, layer)

    def select(self, domain: str | None) -> None:
        """Send all rows of the next batches through this domain's adapter; None for the plain base."""
        for layer in self._layers.values():
            layer.domain = None if domain is None else self.domains.index(domain)
            layer.weights_TN = None

    def mix(self, weights_BN: Tensor, tokens_per_row: int) -> None:
        """Send each of the B sequences of the next batch through its own mixture of all domains, differentiably."""
        weights_TN = weights_BN.repeat_interleave(tokens_per_row, dim=0)
        for layer in self._layers.values():
            layer.domain, layer.weights_TN = None, weights_TN

    def weights(self, domain: str, base_fingerprint: str) -> AdapterWeights:
        """A copy of one domain's adapter on the CPU, ready to be published."""
        return AdapterWeights(
            {
                name: Factors(_copy(layer.a[place]), _copy(layer.b[place]), layer.scales[place])
                for name, layer, place in self._of(domain)
            },
            base_fingerprint,
        )

    def _of(self, domain: str) -> list[tuple[str, _LoraLinear, int]]:
        """The layers that a domain changes, and where its factors stand there."""
        index = self.domains.index(domain)
        return [(name, layer, layer.places[index]) for name, layer in self._layers.items() if index in layer.places]


def _copy(parameter: Tensor) -> Tensor:
    return parameter.detach().to("cpu", copy=True)
