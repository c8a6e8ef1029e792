"""One copy of the base with its engine: takes resolved requests, streams tokens, fetches the adapters it lacks."""

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any

import torch

from cluster.config.serving import AppSettings
from cluster.engine.engine import Engine, EngineStats
from cluster.errors import AdapterUnavailable, ZephyraError
from cluster.lora.affinity import publish
from cluster.lora.packed_adapter import PackedAdapter
from cluster.lora.peft_format import unpack
from cluster.lora.weights import AdapterWeights
from cluster.messages import AdapterRef, AnswerScores, GenerateRequest, ScoreRequest, TokenChunk
from cluster.model.base import load_base, saved_dtype
from deployments import calls
from deployments.monitoring.replica_report import ReplicaReport
from deployments.replica.autoscaling import LOAD, load_of
from deployments.replica.base_folder import base_folder
from deployments.replica.engine_loop import EngineLoop, Loaded
from deployments.replica.host_memory import HostMemory
from deployments.replica.merged_mixtures import MergedMixtures
from deployments.replica.scoring import scored
from deployments.shards.adapter_shard import Fetched, TooLarge

COORDINATOR_WAIT_S = 5.0
"""Longer than the coordinator waits for a shard and than Serve takes to replace a coordinator that died."""


class BaseReplica:
    """Answers with the base and any mixture of adapters, many sequences at once."""

    def __init__(self, coordinator: calls.Handle, settings: AppSettings) -> None:
        torch.set_num_threads(settings.threads or max(1, (os.cpu_count() or 2) - 1))
        self._fetch_in_message = calls.method(coordinator, "fetch", stream=True)
        self._fetch_by_reference = calls.method(coordinator, "fetch", stream=True, by_reference=True)
        self.host = HostMemory(self._fetch_packed, settings.host_adapter_bytes)
        folder = base_folder(settings)
        dtype = saved_dtype(folder) if settings.dtype is None else getattr(torch, settings.dtype)
        base = load_base(folder, dtype, settings.device)
        self._dtype, self._device = base.model.dtype, base.model.device
        self._merged = MergedMixtures(coordinator, settings.merge_rank, self._dtype)
        self._batch_size = settings.engine.max_batch_size
        self._report = ReplicaReport()
        self._telling: asyncio.Task[None] | None = None
        self.engine = EngineLoop(Engine(base, settings.engine), self._fetch, self.host.prefetch)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenChunk | ZephyraError]:
        """The answer's chunks. Cancelling the call takes the sequence out of the batch.

        What is wrong with the request comes as the last item: raised, Serve would log it as this replica's failure.
        """
        with self._merged.in_one(request) as asked:
            async with aclosing(self.engine.generate(asked)) as chunks:
                is_first = True
                try:
                    async for chunk in chunks:
                        yield replace(chunk, merged=self._merged.report(asked)) if is_first else chunk
                        is_first = False
                except ZephyraError as error:
                    yield error

    async def score(self, request: ScoreRequest) -> AsyncIterator[AnswerScores | ZephyraError]:
        """One item: how likely each of the given answers is, or, as with `generate`, what is wrong with the request.

        Cancelling the call takes them all out of the batch.
        """
        with self._merged.in_one(request) as asked:
            try:
                # A second batch waits, so that none is computed half full.
                scores = await scored(self.engine, asked, at_once=2 * self._batch_size)
                yield replace(scores, merged=self._merged.report(asked))
            except ZephyraError as error:
                yield error

    async def stats(self) -> EngineStats:
        """The engine's own numbers."""
        return await self.engine.stats()

    def record_routing_stats(self) -> dict[str, Any]:
        """Called by Serve, which hands it to every AffinityRouter: what this replica holds, and how busy it is."""
        return publish(self.engine.resident, self.host.held, self.engine.num_unanswered)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve, which hands it to `desired_replicas`."""
        stats = await self.engine.stats()
        return {LOAD: load_of(self.engine.num_unanswered, self._batch_size, stats.kv_used_share)}

    async def check_health(self) -> None:
        """Called by Serve every second, which replaces this replica when it raises; sets the gauges on the way."""
        if self.engine.failure is not None:
            raise self.engine.failure
        if self._telling is None or self._telling.done():
            # Health does not wait for a step that takes long.
            self._telling = asyncio.create_task(self._tell())

    async def _tell(self) -> None:
        with suppress(ZephyraError):
            self._report.tell(await self.engine.stats())

    async def _fetch(self, refs: tuple[AdapterRef, ...]) -> AsyncGenerator[Loaded, None]:
        async with aclosing(self.host.get(refs)) as answers:
            async for fetched in answers:
                unpacked = await asyncio.to_thread(self._unpacked, fetched)
                if not isinstance(unpacked, ZephyraError):
                    self._report.loaded(fetched.ref)
                yield fetched.ref, unpacked

    async def _fetch_packed(self, refs: tuple[AdapterRef, ...]) -> AsyncGenerator[Fetched, None]:
        """All at once from the coordinator, adapters and merged mixtures."""
        published = tuple(ref for ref in refs if ref not in self._merged)
        merges = [self._merged.fetch(ref) for ref in refs if ref in self._merged]
        streams = [self._fetch_published(published)] if published else []
        async with aclosing(calls.merge([*streams, *merges])) as answers:
            async for fetched in answers:
                yield fetched

    async def _fetch_published(self, refs: tuple[AdapterRef, ...]) -> AsyncGenerator[Fetched, None]:
        """In messages, which is quicker, then by reference what is too large for them."""
        lost = AdapterUnavailable("The coordinator of the adapters did not answer; try again in a few seconds.")
        large: list[AdapterRef] = []
        in_message = calls.stream(
            self._fetch_in_message, refs, calls.MESSAGE_BYTES, lost=lost, item_timeout_s=COORDINATOR_WAIT_S
        )
        async with aclosing(in_message) as answers:
            async for fetched in answers:
                if isinstance(fetched.result, TooLarge):
                    large.append(fetched.ref)
                else:
                    yield fetched
        if large:
            by_reference = calls.stream(
                self._fetch_by_reference, tuple(large), lost=lost, item_timeout_s=COORDINATOR_WAIT_S
            )
            async with aclosing(by_reference) as answers:
                async for fetched in answers:
                    yield fetched

    def _unpacked(self, fetched: Fetched) -> AdapterWeights | ZephyraError:
        if isinstance(fetched.result, ZephyraError):
            return fetched.result
        assert isinstance(fetched.result, PackedAdapter), "what was too large came by reference"
        try:
            return unpack(fetched.result, self._dtype, self._device)
        except ZephyraError as error:
            return error
