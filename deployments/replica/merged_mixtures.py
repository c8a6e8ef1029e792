"""Mixtures of many adapters, as a base replica serves them: each as one adapter, merged by the coordinator.

The engine sees a mixture of one ref, which names the whole; what the ref stands for is known here, for as long as a
request needs it, and what is certain of it for as long as there may be requests.
"""

from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch

from cluster.errors import AdapterUnavailable, ZephyraError
from cluster.lora.byte_lru import ByteLru
from cluster.lora.certificate import Certificate
from cluster.lora.merging import merged_ref
from cluster.messages import MAX_CO_BATCHED, AdapterRef, GenerateRequest, MergeReport, Mixture, ScoreRequest
from deployments import calls
from deployments.shards.adapter_shard import Fetched
from deployments.shards.merger import MERGE_WAIT_S, MergedMixture, Wanted

_CERTIFICATES, _CERTIFICATE_BYTES = 2**16, 1
"""So many are remembered, more than merged adapters fit in any slot bank."""

R = TypeVar("R", GenerateRequest, ScoreRequest)


class MergedMixtures:
    """Those that one replica serves, at one rank and in its base's numbers."""

    def __init__(self, coordinator: calls.Handle, rank: int, dtype: torch.dtype) -> None:
        self._merge = calls.method(coordinator, "merge", by_reference=True)
        self._rank, self._dtype = rank, dtype
        self._meant: dict[AdapterRef, Mixture] = {}
        self._num_users: Counter[AdapterRef] = Counter()
        self._certificates: ByteLru[AdapterRef, Certificate] = ByteLru(_CERTIFICATES)

    def __contains__(self, ref: AdapterRef) -> bool:
        """Whether `ref` names a mixture that is being served."""
        return ref in self._meant

    @contextmanager
    def in_one(self, request: R) -> Iterator[R]:
        """The request as the engine is to see it: a mixture of many adapters as one, which is known until the end."""
        if len(request.mixture.entries) <= MAX_CO_BATCHED:
            yield request
            return
        ref = merged_ref(request.mixture, self._rank, self._dtype)
        self._meant[ref] = request.mixture
        self._num_users[ref] += 1
        try:
            yield replace(request, mixture=Mixture.of({ref: 1.0}))
        finally:
            self._num_users[ref] -= 1
            if not self._num_users[ref]:
                del self._num_users[ref], self._meant[ref]

    def report(self, request: GenerateRequest | ScoreRequest) -> MergeReport | None:
        """What is certain of the adapter that answers a request made by `in_one`; None if nothing was merged."""
        for ref in request.mixture.refs:
            if (certificate := self._certificates.get(ref)) is not None:
                return MergeReport(certificate.method, certificate.rank, certificate.bound, certificate.kept_energy)
        return None

    async def fetch(self, ref: AdapterRef) -> AsyncGenerator[Fetched, None]:
        """The merged adapter, or why it cannot be had."""
        mixture = self._meant[ref]
        lost = AdapterUnavailable(
            f"The mixture of {len(mixture.entries)} adapters was not merged within {MERGE_WAIT_S:g} s; try again."
        )
        wanted = Wanted(mixture, self._rank, str(self._dtype).removeprefix("torch."))
        merged: MergedMixture | ZephyraError
        try:
            merged = await calls.call(self._merge, wanted, timeout_s=MERGE_WAIT_S, lost=lost)
        except ZephyraError as error:
            merged = error
        if isinstance(merged, MergedMixture):
            self._certificates.put(ref, merged.certificate, _CERTIFICATE_BYTES)
        yield Fetched(ref, merged.packed if isinstance(merged, MergedMixture) else merged)
