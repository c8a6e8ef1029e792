"""Adapters in training: the factors of many domains over one frozen base, on every linear layer.

The forward pass is the one that serving uses, with gradients. Either all rows of a batch go through one domain's
adapter, or each row through its own soft mixture of all. Letters: B sequences, N domains, T rows, I and O widths,
R rank, C columns.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cluster.lora.delta import mask_columns, mixed_delta
from cluster.lora.weights import AdapterWeights, Factors, LinearLayer, adaptable_layers


class _LoraLinear(nn.Module):
    """A frozen layer and the factors of all domains for it."""

    def __init__(self, base: LinearLayer, num_domains: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        # As PEFT initialises: A uniform within 1/sqrt(d_in), B zero, so that training starts from the plain base.
        bound = 1 / math.sqrt(base.in_features)
        self.a = nn.ParameterList(
            torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator) for _ in range(num_domains)
        )
        self.b = nn.ParameterList(torch.zeros(base.out_features, rank) for _ in range(num_domains))
        self.domain: int | None = None
        self.scale = 1.0
        self.mask_TC: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if self.domain is not None:
            delta: Tensor = x @ self.a[self.domain].T @ self.b[self.domain].T
            return y + delta * self.scale
        if self.mask_TC is not None:
            a_CI, b_CO = torch.cat(list(self.a)), torch.cat([b.T for b in self.b])
            return y + mixed_delta(x.reshape(-1, x.shape[-1]), a_CI, b_CO, self.mask_TC).view(y.shape)
        return y


class TrainableAdapters:
    """One adapter per domain, attached to `model` in place. Only the factors are trained."""

    def __init__(self, model: PreTrainedModel, domains: Sequence[str], rank: int, alpha: float, seed: int) -> None:
        self.domains = tuple(domains)
        self._rank, self._scale = rank, alpha / rank
        generator = torch.Generator().manual_seed(seed)
        self._layers: dict[str, _LoraLinear] = {}
        for name, linear in adaptable_layers(model).items():
            self._layers[name] = _LoraLinear(linear, len(self.domains), rank, generator)
            self._layers[name].scale = self._scale
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, self._layers[name])

    def parameters(self, domain: str) -> dict[str, nn.Parameter]:
        """The factors of one domain, by name."""
        index = self.domains.index(domain)
        return {
            f"{name}.{side}": factors[index]
            for name, layer in self._layers.items()
            for side, factors in (("a", layer.a), ("b", layer.b))
        }

    def select(self, domain: str | None) -> None:
        """Send all rows of the next batches through this domain's adapter; None for the plain base."""
        for layer in self._layers.values():
            layer.domain = None if domain is None else self.domains.index(domain)
            layer.mask_TC = None

    def mix(self, weights_BN: Tensor, tokens_per_row: int) -> None:
        """Send each of the B sequences of the next batch through its own mixture of all domains, differentiably."""
        owner_C = torch.arange(len(self.domains)).repeat_interleave(self._rank)
        scale_C = torch.full((len(owner_C),), self._scale)
        mask_TC = mask_columns(weights_BN.repeat_interleave(tokens_per_row, dim=0), owner_C, scale_C)
        for layer in self._layers.values():
            layer.domain, layer.mask_TC = None, mask_TC

    def weights(self, domain: str, base_fingerprint: str) -> AdapterWeights:
        """A copy of one domain's adapter, ready to be published."""
        index = self.domains.index(domain)
        return AdapterWeights(
            {
                name: Factors(layer.a[index].detach().clone(), layer.b[index].detach().clone(), self._scale)
                for name, layer in self._layers.items()
            },
            base_fingerprint,
        )

    @torch.no_grad()
    def load(self, domain: str, weights: AdapterWeights) -> None:
        """Start a domain from a published adapter of the same rank."""
        index = self.domains.index(domain)
        for name, layer in self._layers.items():
            factors = weights.factors[name]
            layer.a[index].copy_(factors.a_RI)
            layer.b[index].copy_(factors.b_OR * (factors.scale / self._scale))
