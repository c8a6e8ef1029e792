"""A library of adapters as it would be: what its router chooses, and what answers then. Nothing here is published."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.messages import AdapterRef, Mixture
from cluster.router.tiny_ada import TinyAda
from cluster.training.mixture_losses import mixture_of

_FIRST_DRAFT = 10**12
"""Versions from here on are drafts: no published one is called so."""

_drafts = itertools.count(_FIRST_DRAFT)


@dataclass(frozen=True, slots=True)
class Library:
    """Which adapter answers for which domain, and what each adapter is made of."""

    router: TinyAda
    answers: Mapping[str, AdapterRef]
    """By the name that the router knows; several may have the same."""
    parts: Mapping[AdapterRef, Mapping[str, float]]
    """Shares of the first adapters, by domain, in each that answers; they sum to 1."""

    @classmethod
    def of(cls, router: TinyAda, refs: Mapping[str, AdapterRef]) -> "Library":
        """As it is published."""
        return cls(router, dict(refs), {ref: {ref.domain: 1.0} for ref in refs.values()})

    @property
    def size(self) -> int:
        """Adapters."""
        return len(self.parts)

    def names(self, ref: AdapterRef) -> list[str]:
        """The domains that an adapter answers for."""
        return [name for name, of_name in self.answers.items() if of_name == ref]

    def without(self, ref: AdapterRef) -> "Library":
        """Its domains' prompts go where the router then sends them."""
        router = self.router
        for name in self.names(ref):
            if name in router.domains:
                router = router.without_domain(name)
        kept = {name: of_name for name, of_name in self.answers.items() if of_name != ref}
        return replace(self, router=router, answers=kept, parts=_less(self.parts, ref))

    def combined(self, ref: AdapterRef, into: AdapterRef, shares: tuple[float, float]) -> "Library":
        """One draft answers for the domains of both; `shares` of the first and the second sum to 1."""
        draft = AdapterRef(into.domain, next(_drafts))
        answers = {name: draft if of_name in (ref, into) else of_name for name, of_name in self.answers.items()}
        mixed: dict[str, float] = {}
        for part, share in ((ref, shares[0]), (into, shares[1])):
            for name, weight in self.parts[part].items():
                mixed[name] = mixed.get(name, 0.0) + share * weight
        return replace(self, answers=answers, parts={**_less(_less(self.parts, ref), into), draft: mixed})

    def mixtures(self, weights: Sequence[Mapping[str, float]]) -> list[Mixture]:
        """What answers where the router decided so."""
        return [mixture_of(of_row, self.answers) for of_row in weights]


def is_draft(ref: AdapterRef) -> bool:
    """Whether `ref` is none that was published."""
    return ref.version >= _FIRST_DRAFT


def _less(parts: Mapping[AdapterRef, Mapping[str, float]], ref: AdapterRef) -> dict[AdapterRef, Mapping[str, float]]:
    return {other: of_other for other, of_other in parts.items() if other != ref}
