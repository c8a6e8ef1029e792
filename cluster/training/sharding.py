"""A model whose weights, gradients and moments lie spread over the workers: FSDP2 (torch's `fully_shard`).

Values are those of the whole model but for rounding. Knows nothing of what is trained.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel


def shard(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> None:
    """Keep a part of each weight on each worker from here on; gradients become means over the workers.

    Layers multiply `dtype`; parts, and sums of gradients, stay float32.
    """
    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision)


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with every tensor in one piece; where some are spread, all workers have to call this."""
    return {
        name: tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor
        for name, tensor in tensors.items()
    }


def spread_like(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` in pieces on the workers where `like` is, if it has its shape: a count of steps lies whole on each."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def whole_model(model: PreTrainedModel, fresh: PreTrainedModel) -> PreTrainedModel:
    """`fresh`, of the same configuration, with the weights of `model`; all workers have to call this."""
    fresh.load_state_dict(whole(model.state_dict()))
    return fresh
