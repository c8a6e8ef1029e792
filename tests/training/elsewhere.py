"""A process of its own that trains on a device which is only pretended: everything that meets must lie on it.

For `test_compute`. Tensors are torch's fake ones, shapes without numbers, on a backend made up in Python; an operation
on tensors of two devices raises, as it would on a GPU. Registering a backend cannot be undone, so not in the tests'
own process.
"""

import copy

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import PreTrainedModel

from cluster.training.data import collate
from cluster.training.documents import documents
from cluster.training.grouped_lora import AdapterShape, GroupedAdapters
from cluster.training.language_model import batch_loss
from cluster.training.passes import OnePass, arrange, token_losses
from cluster.training.trainable_lora import TrainableAdapters
from tests.lora.adapters import random_adapter
from tests.model.nano import nano_model
from tests.training.rows import nano_tokenizer, some_examples

TOKENIZER = nano_tokenizer()
EXAMPLES = some_examples(TOKENIZER, 12)
ROWS = {"law": EXAMPLES[:7], "math": EXAMPLES[7:]}
_setup_privateuseone_for_python_backend("elsewhere")
ELSEWHERE = torch.device("elsewhere:0")


def _moved(model: PreTrainedModel) -> PreTrainedModel:
    """A fake copy there."""
    moved = copy.deepcopy(model)
    for module in moved.modules():
        for name, parameter in module.named_parameters(recurse=False):
            there = torch.empty(parameter.shape, dtype=parameter.dtype, device=ELSEWHERE)
            setattr(module, name, nn.Parameter(there, requires_grad=parameter.requires_grad))
    moved.tie_weights()
    return moved


def _a_base(model: PreTrainedModel) -> None:
    base = _moved(model.requires_grad_(True))
    with documents(base) as takes_lengths:
        (batch,) = arrange(ROWS, 10**9, learn_prompts=True)
        token_losses(base, batch.to(ELSEWHERE), takes_lengths).mean().backward()
    assert all(p.grad is not None and p.grad.device == ELSEWHERE for p in base.parameters())


def _adapters(model: PreTrainedModel) -> None:
    base = _moved(model.requires_grad_(False))
    adapters = GroupedAdapters(base)
    adapters.add("law", AdapterShape(rank=2, alpha=4.0), seed=0)
    adapters.add_weights("math", random_adapter(nano_model(vocab_size=len(TOKENIZER)), (2,), 0))
    one_pass = OnePass(base, adapters)
    with one_pass.open():
        for batch in arrange(ROWS, 512):
            losses_M = one_pass.losses(batch)
            assert losses_M.device == ELSEWHERE
            losses_M.sum().backward()
    for domain in ROWS:
        factors = adapters.weights(domain, "0" * 16).factors.values()
        assert all(f.a_RI.device == f.b_OR.device == torch.device("cpu") for f in factors)


def _a_soft_mixture(model: PreTrainedModel) -> None:
    weights = {domain: random_adapter(nano_model(vocab_size=len(TOKENIZER)), (2,), 0) for domain in ROWS}
    base = _moved(model.requires_grad_(False))
    adapters = TrainableAdapters(base, weights)
    batch = collate([[EXAMPLES[0]], [EXAMPLES[8]]], 0, learn_prompts=False)
    shares_BN = torch.full((2, 2), 0.5, device=ELSEWHERE, requires_grad=True)
    adapters.mix(shares_BN, batch.ids_BT.shape[1])
    batch_loss(base, batch).backward()
    assert shares_BN.grad is not None
    assert all(p.grad is not None and p.grad.device == ELSEWHERE for p in adapters.parameters("law").values())
    assert all(f.a_RI.device.type == "cpu" for f in adapters.weights("law", "0" * 16).factors.values())


if __name__ == "__main__":
    nano = nano_model(vocab_size=len(TOKENIZER))
    for train in (_a_base, _adapters, _a_soft_mixture):
        with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
            train(nano)
        print(train.__name__, flush=True)
