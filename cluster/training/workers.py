"""The workers that run one stage together: who this one is, what it shares with the others, and what is its part.

More than one speak through torch's default process group, which whoever starts them has set up.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.errors import ZephyraError

T = TypeVar("T")


class Workers:
    """This worker among those of its stage; by default it is the only one."""

    def __init__(
        self, rank: int = 0, count: int = 1, shards_base: bool = False, device: torch.device | None = None
    ) -> None:
        """`shards_base`: stage base keeps a part of the weights and moments on each worker, instead of all on all.

        `device`: where this one computes; by default the CPU.
        """
        self.rank, self.count = rank, count
        self.device = device or torch.device("cpu")
        self.shards_base = shards_base and count > 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that publishes, and speaks for all."""
        return self.rank == 0

    def each(self, work: Callable[[], T]) -> list[T]:
        """What `work` gives on each of the workers, by rank; all of them have to call this.

        What it raises on one is raised on all, if it is an error of ours: nobody waits for a worker that has given up.
        """
        if self.count == 1:
            return [work()]
        given: T | ZephyraError
        try:
            given = work()
        except ZephyraError as error:
            given = error
        everyone: list[T | ZephyraError] = [given] * self.count
        dist.all_gather_object(everyone, given)
        done: list[T] = []
        for one in everyone:
            if isinstance(one, ZephyraError):
                raise one
            done.append(one)
        return done

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the workers, in one message; all of them have to call this."""
        if self.count == 1:
            return
        kept = list(tensors)
        flat = torch.cat([tensor.flatten() for tensor in kept])
        dist.all_reduce(flat)
        for tensor, summed in zip(kept, flat.split([tensor.numel() for tensor in kept]), strict=True):
            tensor.copy_(summed.view_as(tensor))

    def part(self, sizes: Sequence[int]) -> list[int]:
        """Which of so many things are this worker's: the places in `sizes`, ascending."""
        return balanced(sizes, self.count)[self.rank]


def balanced(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Places in `sizes` in `count` groups of nearly equal sums: the largest first, each to the group that has least.

    At most 4/3 of the best possible (Graham 1969, "Bounds on multiprocessing timing anomalies").
    """
    groups: list[list[int]] = [[] for _ in range(count)]
    sums = [0] * count
    for place in sorted(range(len(sizes)), key=lambda place: (-sizes[place], place)):
        least = sums.index(min(sums))
        groups[least].append(place)
        sums[least] += sizes[place]
    return [sorted(group) for group in groups]
