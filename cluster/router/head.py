"""Encodings -> one logit per domain and one for none. Knows nothing of text or of training.

A domain's logit reads its own prototypes only, and none's reads no prototype: adding or removing a domain changes no
other logit by a bit. Letters: B texts, D domains, P prototypes of a domain, V width of the vector and of what is
novel together, E evidence.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cluster.router.encoder import NOVEL_WIDTH, NUM_EVIDENCE, Encoding
from cluster.router.scoring import MAX_LENGTH, FixedPrototypes, Run, runs

SHARPNESS = 12.0
"""What products with prototypes are multiplied by: the nearest prototype decides, and the others smooth."""

_NONE_WIDTH = 32


def domain_logits(keys_BV: Tensor, prototypes_DPV: Tensor, num_prototypes_D: Tensor) -> Tensor:
    """[B, D]: the log of the mean over a domain's prototypes of exp(SHARPNESS * product); further rows are padding.

    For training: all in floats, and differentiable. One product of the same shape per domain, and double precision
    after it, so that what comes out for one domain does not depend on how many others there are.
    """
    num_domains, num_rows, _ = prototypes_DPV.shape
    product_DBP = torch.bmm(keys_BV.expand(num_domains, -1, -1), prototypes_DPV.transpose(1, 2))
    padding_DP = torch.arange(num_rows) >= num_prototypes_D[:, None]
    scaled_DBP = (product_DBP.double() * SHARPNESS).masked_fill(padding_DP[:, None], -math.inf)
    return (scaled_DBP.logsumexp(-1) - num_prototypes_D.double().log()[:, None]).float().T


@dataclass(frozen=True, slots=True)
class Rows:
    """What a head holds of domains."""

    prototypes_DPV: Tensor
    num_prototypes_D: Tensor
    offsets_D: Tensor


class Head(nn.Module):
    """The rows of every domain (never trained by gradient here), the none network, and what calibration found."""

    prototypes_DPV: Tensor
    """Unit vectors beside sketches; the latter are zero in trained domains, unless training was told otherwise."""
    num_prototypes_D: Tensor
    offsets_D: Tensor
    """Added to a domain's logit: 0 but for domains added from examples."""
    none_offset: Tensor
    temperature: Tensor
    own_logit: Tensor
    """The mean logit, before the temperature, of held-out prompts for their own domain."""

    def __init__(self, num_domains: int, num_prototypes: int, width: int) -> None:
        super().__init__()
        self.register_buffer("prototypes_DPV", torch.zeros(num_domains, num_prototypes, width + NOVEL_WIDTH))
        self.register_buffer("num_prototypes_D", torch.ones(num_domains, dtype=torch.long))
        self.register_buffer("offsets_D", torch.zeros(num_domains))
        self.register_buffer("none_offset", torch.zeros(()))
        self.register_buffer("temperature", torch.ones(()))
        self.register_buffer("own_logit", torch.zeros(()))
        self._fixed: FixedPrototypes | None = None
        self.none_in = nn.Linear(width + NUM_EVIDENCE, _NONE_WIDTH)
        self.none_out = nn.Linear(_NONE_WIDTH, 1)

    def none_logit(self, encoding: Encoding) -> Tensor:
        """[B], before `none_offset`: from the vector and the evidence alone."""
        hidden = nn.functional.gelu(self.none_in(torch.cat((encoding.z_BW, encoding.evidence_BE), dim=1)))
        logit_B1: Tensor = self.none_out(hidden)
        return logit_B1.squeeze(1)

    def raw_logits(self, encoding: Encoding) -> Tensor:
        """Logits [B, D + 1] before the temperature, none last.

        Where `encoding` is to be trained, the gradient is that of floats; the numbers are those of serving.
        """
        keys_BV = keys(encoding)
        domains_BD = self.fixed_prototypes().logits(keys_BV.detach(), SHARPNESS)
        if keys_BV.requires_grad:
            smooth_BD = domain_logits(keys_BV, self.prototypes_DPV, self.num_prototypes_D)
            domains_BD = domains_BD + (smooth_BD - smooth_BD.detach())
        none_B1 = (self.none_logit(encoding) + self.none_offset)[:, None]
        return torch.cat((domains_BD + self.offsets_D, none_B1), dim=1)

    def forward(self, encoding: Encoding) -> Tensor:
        """Calibrated logits [B, D + 1], none last."""
        return self.raw_logits(encoding) / self.temperature

    def fixed_prototypes(self) -> FixedPrototypes:
        """The rows as they are scored, made anew when they were replaced or written to."""
        if self._fixed is None or not self._fixed.are_of(self.prototypes_DPV, self.num_prototypes_D):
            self._fixed = FixedPrototypes.of(self.prototypes_DPV, self.num_prototypes_D)
        return self._fixed

    def __getstate__(self) -> dict[str, object]:
        """For copies and pickles: they make the rows that are scored from prototypes of their own."""
        return {**self.__dict__, "_fixed": None}

    def check_rows(self) -> None:
        """Raise `ValueError` for numbers of rows that cannot be, or rows longer than can be scored in fixed point."""
        num_rows = self.prototypes_DPV.shape[1]
        if not bool(((self.num_prototypes_D >= 1) & (self.num_prototypes_D <= num_rows)).all()):
            raise ValueError(f"a domain has none or more than {num_rows} prototypes")
        lengths_DP = torch.linalg.vector_norm(self.prototypes_DPV, dim=2)
        if bool((lengths_DP > MAX_LENGTH).any()):
            raise ValueError(f"a prototype has the length {float(lengths_DP.max()):.3g}, expected at most {MAX_LENGTH}")

    def set_rows(self, domain: int, prototypes_PV: Tensor) -> None:
        """Replace the prototypes of a domain; `prototypes_PV` has at most as many rows as there is room for."""
        self.prototypes_DPV[domain] = 0.0
        self.prototypes_DPV[domain, : len(prototypes_PV)] = prototypes_PV
        self.num_prototypes_D[domain] = len(prototypes_PV)

    def make_room(self, num_rows: int) -> None:
        """For so many prototypes in each domain, and no fewer than there are."""
        lacking = num_rows - self.prototypes_DPV.shape[1]
        if lacking > 0:
            self.prototypes_DPV = nn.functional.pad(self.prototypes_DPV, (0, 0, 0, lacking))

    def insert(self, domain: int) -> None:
        """Make room for a domain before number `domain`; the others keep their rows bit for bit."""
        for name in ("prototypes_DPV", "num_prototypes_D", "offsets_D"):
            rows = getattr(self, name)
            size = (1, *rows.shape[1:])
            fresh = rows.new_ones(size) if name == "num_prototypes_D" else rows.new_zeros(size)
            setattr(self, name, torch.cat((rows[:domain], fresh, rows[domain:])))

    def rearranged(self, fresh: Rows, numbers: Sequence[int]) -> "Head":
        """A head of its own whose domains are these `numbers`: of this one's, and after its last those of `fresh`.

        What stays together is copied together, already rounded rows as they are. Every domain keeps its bits.
        """
        scored = self.fixed_prototypes()
        made = copy.deepcopy(self, {id(self.prototypes_DPV): self.prototypes_DPV})
        made.make_room(fresh.prototypes_DPV.shape[1])
        lacking = made.prototypes_DPV.shape[1] - fresh.prototypes_DPV.shape[1]
        fresh_DPV = nn.functional.pad(fresh.prototypes_DPV, (0, 0, 0, lacking))
        taken = runs(numbers, len(scored.starts) - 1)
        made.prototypes_DPV = _joined(made.prototypes_DPV, fresh_DPV, taken)
        made.num_prototypes_D = _joined(self.num_prototypes_D, fresh.num_prototypes_D, taken)
        made.offsets_D = _joined(self.offsets_D, fresh.offsets_D, taken)
        fresh_scored = FixedPrototypes.of(fresh.prototypes_DPV, fresh.num_prototypes_D)
        made._fixed = scored.joined(fresh_scored, taken, (made.prototypes_DPV, made.num_prototypes_D))
        return made

    def remove(self, domain: int) -> None:
        """Drop the rows of a domain."""
        for name in ("prototypes_DPV", "num_prototypes_D", "offsets_D"):
            rows = getattr(self, name)
            setattr(self, name, torch.cat((rows[:domain], rows[domain + 1 :])))


def _joined(old: Tensor, fresh: Tensor, taken: Sequence[Run]) -> Tensor:
    parts = [(fresh if run.is_fresh else old)[run.first : run.last] for run in taken]
    return torch.cat(parts) if parts else old[:0]


def keys(encoding: Encoding) -> Tensor:
    """[B, V]: what prototypes are compared with."""
    return torch.cat((encoding.z_BW, encoding.novel_BU), dim=1)
