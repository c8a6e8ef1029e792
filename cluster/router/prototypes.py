"""Vectors of one domain's examples -> its prototypes. Knows nothing of text or of other domains.

Letters: N examples, P prototypes, V width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_ROUNDS = 12


def cluster_prototypes(keys_NV: Tensor, num_prototypes: int) -> Tensor:
    """At most `num_prototypes` unit vectors [P, V] by spherical k-means; the same examples give the same ones.

    Starts from the example nearest the mean, then always from the one farthest from all chosen so far. Fewer distinct
    examples than prototypes give that many prototypes.
    """
    unit_NV = nn.functional.normalize(keys_NV, dim=1)
    chosen = [int((unit_NV @ unit_NV.mean(0)).argmax())]
    nearest_N = unit_NV @ unit_NV[chosen[0]]
    while len(chosen) < num_prototypes and float(nearest_N.min()) < 1 - 1e-6:
        chosen.append(int(nearest_N.argmin()))
        nearest_N = torch.maximum(nearest_N, unit_NV @ unit_NV[chosen[-1]])
        if len(chosen) == len(unit_NV):
            break
    return recentre(unit_NV, unit_NV[chosen])


def recentre(keys_NV: Tensor, prototypes_PV: Tensor, widths: Sequence[int] | None = None) -> Tensor:
    """`prototypes_PV` turned to the means of the examples nearest to each, over and over.

    Each of the parts that `widths` cuts a prototype into (one by default) keeps its length: what is zero stays zero.
    A prototype without examples stays where it is. Each round brings examples and their prototypes nearer, never
    farther.
    """
    widths = widths or (prototypes_PV.shape[1],)
    for _ in range(_ROUNDS):
        owner_N = (keys_NV @ prototypes_PV.T).argmax(1)
        sums_PV = torch.zeros_like(prototypes_PV).index_add_(0, owner_N, keys_NV)
        parts = zip(sums_PV.split(widths, dim=1), prototypes_PV.split(widths, dim=1), strict=True)
        turned = [
            nn.functional.normalize(sum_PV, dim=1) * torch.linalg.vector_norm(old_PV, dim=1, keepdim=True)
            for sum_PV, old_PV in parts
        ]
        held_P = torch.linalg.vector_norm(sums_PV, dim=1) > 0
        prototypes_PV = torch.where(held_P[:, None], torch.cat(turned, dim=1), prototypes_PV)
    return prototypes_PV
