"""The prototypes of one domain as a file of their own, beside its adapter, and the router that many such files make.

A file belongs to the version of the router whose encoder made its rows; under another they mean nothing, and are made
again from the domain's examples. Letters: P prototypes of a domain, D domains, V width of a prototype.
"""

import copy
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from cluster.errors import CorruptArtifact
from cluster.lora.safetensors_header import check_header
from cluster.router.examples import Examples
from cluster.router.head import Rows
from cluster.router.scoring import MAX_LENGTH
from cluster.router.tiny_ada import TinyAda

PROTOTYPES_FILE = "prototypes.safetensors"
MAX_PROTOTYPES_BYTES = 2**24

_HEADER = "zephyra"


@dataclass(frozen=True, slots=True)
class DomainPrototypes:
    """What the router knows of one domain."""

    rows_PV: Tensor
    offset: float
    """Added to the domain's logit."""
    router: int
    """Version of the router whose encoder made the rows."""
    is_data_free: bool
    """Made from words of the adapter, not from examples that somebody gave."""

    def to_bytes(self) -> bytes:
        """The file."""
        header = {"format": 1, "router": self.router, "data_free": self.is_data_free}
        tensors = {"rows": self.rows_PV.contiguous(), "offset": torch.tensor(self.offset)}
        return safetensors.torch.save(tensors, metadata={_HEADER: json.dumps(header)})

    @classmethod
    def from_bytes(cls, content: bytes) -> "DomainPrototypes":
        """The inverse of `to_bytes`. Raises `CorruptArtifact` for anything else."""
        try:
            metadata = check_header(content, len(content)).metadata
            header = json.loads(metadata[_HEADER])
            tensors = safetensors.torch.load(content)
            rows_PV, offset = tensors["rows"], float(tensors["offset"])
            if header["format"] != 1 or rows_PV.ndim != 2 or not len(rows_PV) or rows_PV.dtype != torch.float32:
                raise ValueError(f"format {header['format']}, rows {rows_PV.dtype} {tuple(rows_PV.shape)}")
            if not (torch.isfinite(rows_PV).all() and torch.isfinite(tensors["offset"])):
                raise ValueError("NaN or infinity")
            if (longest := float(torch.linalg.vector_norm(rows_PV, dim=1).max())) > MAX_LENGTH:
                raise ValueError(f"a row of length {longest:.3g}, expected at most {MAX_LENGTH}")
            return cls(rows_PV, offset, int(header["router"]), bool(header["data_free"]))
        except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise CorruptArtifact(f"The prototypes cannot be read ({error}); add the domain again.") from error


def prototypes_from_examples(
    ada: TinyAda, router: int, name: str, examples: Examples | Sequence[str], is_data_free: bool = False
) -> DomainPrototypes:
    """What `ada`, version `router`, learns of `name` from its examples. Raises `InvalidInput` as `with_domain` does."""
    known = ada.without_domain(name) if name in ada.domains else ada
    given = Examples.of(examples)
    return prototypes_of(known.with_domain(name, given.prompts, given.topics, is_data_free), name, router)


@torch.no_grad()
def with_prototypes(ada: TinyAda, added: Mapping[str, DomainPrototypes], removed: Collection[str]) -> TinyAda:
    """`ada` without the domains `removed` and with those `added`, in place of its own rows where it knows the domain.

    All at once: the rows are copied once, however many domains come or go, and only what is added is rounded anew. The
    encoder is shared with `ada`. Raises `CorruptArtifact` for rows of another width.
    """
    width = ada.head.prototypes_DPV.shape[2]
    for name, given in added.items():
        if given.rows_PV.shape[1] != width:
            raise CorruptArtifact(
                f"The prototypes of {name!r} have {given.rows_PV.shape[1]} numbers, the router's have {width}; add the "
                "domain again."
            )
    numbers = {name: number for number, name in enumerate(ada.domains)}
    for name in removed:
        numbers.pop(name, None)
    numbers |= {name: len(ada.domains) + number for number, name in enumerate(sorted(added))}
    names = tuple(sorted(numbers))
    head = ada.head.rearranged(_stacked(added, width), [numbers[name] for name in names])
    made = copy.deepcopy(ada, {id(ada.encoder): ada.encoder, id(ada.domains): names, id(ada.head): head})
    guesses = {name for name, given in added.items() if given.is_data_free}
    made.data_free = frozenset(name for name in ada.data_free if name in numbers and name not in added) | guesses
    return made


def prototypes_of(ada: TinyAda, name: str, router: int) -> DomainPrototypes:
    """What `ada`, version `router`, knows of `name`, one of its domains."""
    index, head = ada.domains.index(name), ada.head
    rows_PV = head.prototypes_DPV[index, : int(head.num_prototypes_D[index])].clone()
    return DomainPrototypes(rows_PV, float(head.offsets_D[index]), router, name in ada.data_free)


def _stacked(added: Mapping[str, DomainPrototypes], width: int) -> Rows:
    """The rows of all, by name."""
    given = [added[name] for name in sorted(added)]
    sizes = [len(one.rows_PV) for one in given]
    counts_D = torch.tensor(sizes, dtype=torch.long)
    prototypes_DPV = torch.zeros(len(given), max(sizes, default=0), width)
    if given:
        # Ten thousand domains in one copy, not ten thousand copies.
        held_DP = torch.arange(prototypes_DPV.shape[1]) < counts_D[:, None]
        prototypes_DPV[held_DP] = torch.cat([one.rows_PV for one in given])
    return Rows(prototypes_DPV, counts_D, torch.tensor([one.offset for one in given], dtype=torch.float32))
