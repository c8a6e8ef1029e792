"""One copy of the base with its engine: takes resolved requests, streams tokens, fetches the adapters it lacks."""

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import torch

from cluster.config import AppSettings
from cluster.engine.engine import Engine, EngineStats
from cluster.errors import AdapterUnavailable, ZephyraError
from cluster.lora.peft_format import unpack
from cluster.lora.weights import AdapterWeights
from cluster.messages import AdapterRef, GenerateRequest, TokenChunk
from cluster.model.base import load_base, saved_dtype
from deployments import calls
from deployments.adapter_shard import Fetched
from deployments.base_folder import base_folder
from deployments.engine_loop import EngineLoop, Loaded

COORDINATOR_WAIT_S = 5.0
"""Longer than the coordinator waits for a shard and than Serve takes to replace a coordinator that died."""


class BaseReplica:
    """Answers with the base and any mixture of adapters, many sequences at once."""

    def __init__(self, coordinator: calls.Handle, settings: AppSettings) -> None:
        torch.set_num_threads(settings.threads or max(1, (os.cpu_count() or 2) - 1))
        # Adapters may exceed what a message may hold.
        self._coordinator = calls.method(coordinator, "fetch", stream=True, by_reference=True)
        folder = base_folder(settings)
        dtype = saved_dtype(folder) if settings.dtype is None else getattr(torch, settings.dtype)
        base = load_base(folder, dtype, settings.device)
        self._dtype, self._device = base.model.dtype, base.model.device
        self.engine = EngineLoop(Engine(base, settings.engine), self._fetch)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenChunk | ZephyraError]:
        """The answer's chunks. Cancelling the call takes the sequence out of the batch.

        What is wrong with the request comes as the last item: raised, Serve would log it as this replica's failure.
        """
        async with aclosing(self.engine.generate(request)) as chunks:
            try:
                async for chunk in chunks:
                    yield chunk
            except ZephyraError as error:
                yield error

    async def stats(self) -> EngineStats:
        """The engine's own numbers."""
        return await self.engine.stats()

    async def check_health(self) -> None:
        """Called by Serve, which replaces this replica when it raises."""
        if self.engine.failure is not None:
            raise self.engine.failure

    async def _fetch(self, refs: tuple[AdapterRef, ...]) -> AsyncGenerator[Loaded, None]:
        lost = AdapterUnavailable("The coordinator of the adapters did not answer; try again in a few seconds.")
        answers = calls.stream(self._coordinator, refs, lost=lost, item_timeout_s=COORDINATOR_WAIT_S)
        async with aclosing(answers):
            async for fetched in answers:
                yield fetched.ref, await asyncio.to_thread(self._unpacked, fetched)

    def _unpacked(self, fetched: Fetched) -> AdapterWeights | ZephyraError:
        if isinstance(fetched.result, ZephyraError):
            return fetched.result
        try:
            return unpack(fetched.result, self._dtype, self._device)
        except ZephyraError as error:
            return error
