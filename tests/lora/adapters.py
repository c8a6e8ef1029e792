"""Random adapters for nano models, and models that answer through them."""

import copy

import torch
from torch import Tensor

from cluster.lora.linear import attach_mixed_batch
from cluster.lora.weights import AdapterWeights, Factors, adaptable_layers
from cluster.messages import AdapterRef, Mixture
from cluster.model import ZephyraFusionForCausalLM
from tests.model.nano import logits

REF = AdapterRef("law", 1)
FINGERPRINT = "0123456789abcdef"


def random_adapter(
    model: ZephyraFusionForCausalLM, ranks: tuple[int, ...] = (4,), seed: int = 0, dtype: torch.dtype = torch.float32
) -> AdapterWeights:
    """Random factors for every layer; the layers take the ranks in turn, and each has a scale of its own."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for index, (name, layer) in enumerate(adaptable_layers(model).items()):
        rank = ranks[index % len(ranks)]
        a_RI = torch.randn(rank, layer.in_features, generator=generator) * 0.2
        b_OR = torch.randn(layer.out_features, rank, generator=generator) * 0.2
        factors[name] = Factors(a_RI.to(dtype), b_OR.to(dtype), scale=(index % 3 + 1) / 2)
    return AdapterWeights(factors, FINGERPRINT)


def mixed_logits(model: ZephyraFusionForCausalLM, weights: AdapterWeights, ids_BT: Tensor) -> Tensor:
    """Logits as serving computes them: every row through `weights` alone."""
    served = copy.deepcopy(model)
    batch = attach_mixed_batch(served)
    batch.set_rows([Mixture.of({REF: 1.0})] * len(ids_BT), [ids_BT.shape[1]] * len(ids_BT), {REF: weights})
    return logits(served, ids_BT)
