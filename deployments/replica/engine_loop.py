"""Runs an engine's steps in a thread of its own and carries chunks to the event loop. Knows nothing of Ray.

A step of the model would block the loop, and with it every other request of the replica. Only its thread touches the
engine, but for `prepare_adapter`; everything else reaches it as a job in the inbox.
"""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from concurrent.futures import Future
from functools import partial

from cluster.engine.engine import Engine, EngineStats, StepOutput
from cluster.errors import AdapterUnavailable, ReplicaLost, ZephyraError
from cluster.lora.weights import AdapterWeights, Resident
from cluster.messages import AdapterRef, GenerateRequest, TokenChunk

logger = logging.getLogger("ray.serve")

_IDLE_S = 0.1
"""Without a request for so long, the engine checks itself."""

_FAILED = "The engine of this replica has failed; try again in a few seconds."

Loaded = tuple[AdapterRef, AdapterWeights | ZephyraError]
"""An adapter that was asked for, or why it cannot be had."""

FetchAdapters = Callable[[tuple[AdapterRef, ...]], AsyncIterator[Loaded]]
"""Gets adapters; gives each of them once, in any order."""

Prefetch = Callable[[tuple[AdapterRef, ...]], None]
"""Told, whenever it changes, what the queue will need once there is room: the next first. Starts fetching, or not."""


class EngineLoop:
    """Feeds one engine. Must be made inside the event loop that `generate` is called from."""

    def __init__(self, engine: Engine, fetch: FetchAdapters, prefetch: Prefetch | None = None) -> None:
        self._engine = engine
        self._fetch = fetch
        self._prefetch = prefetch
        self._loop = asyncio.get_running_loop()
        self._answers: dict[str, asyncio.Queue[TokenChunk | Exception]] = {}
        self._fetches: set[asyncio.Task[None]] = set()
        # Touched by the engine's thread only.
        self._fetching: set[AdapterRef] = set()
        self._upcoming: tuple[AdapterRef, ...] = ()
        self._resident: tuple[AdapterRef, ...] = ()
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> Exception | None:
        """What ended the engine's thread, if anything did; no request is served after that."""
        return self._failure

    @property
    def resident(self) -> tuple[AdapterRef, ...]:
        """The adapters in the slot bank, as of the last that came."""
        return self._resident

    @property
    def num_unanswered(self) -> int:
        """Requests that wait or run."""
        return len(self._answers)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        """The answer's chunks as they are made; those ready together come as one. Closing it early cancels it.

        Raises what `Engine.submit` raises, or why an adapter it needs cannot be had.
        """
        self._check_alive()
        answer: asyncio.Queue[TokenChunk | Exception] = asyncio.Queue()
        self._answers[request.request_id] = answer
        self._send(partial(self._submit, request))
        ended = False
        try:
            while not ended:
                item = await answer.get()
                while isinstance(item, TokenChunk) and not answer.empty():
                    following = answer.get_nowait()
                    if isinstance(following, Exception):
                        answer.put_nowait(following)
                        break
                    item = _joined(item, following)
                ended = isinstance(item, Exception) or item.finish_reason is not None
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            del self._answers[request.request_id]
            if not ended:
                self._send(partial(self._engine.cancel, request.request_id))

    async def stats(self) -> EngineStats:
        """The engine's own numbers, taken between two steps."""
        self._check_alive()
        result: Future[EngineStats] = Future()
        self._send(lambda: result.set_result(self._engine.stats()))
        return await asyncio.wrap_future(result)

    def stop(self) -> None:
        """End the thread after the step at hand, and wait for it."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise ReplicaLost(_FAILED)

    def _send(self, job: Callable[[], None]) -> None:
        with self._wake:
            self._inbox.append(job)
            self._wake.notify()

    def _run(self) -> None:
        try:
            while self._take_jobs():
                if self._engine.has_work:
                    self._deliver(self._engine.step())
                self._ask_for_adapters()
        except Exception as error:
            logger.exception("The engine has failed; this replica will be replaced.")
            self._failure = error
            self._loop.call_soon_threadsafe(self._fail_all)

    def _take_jobs(self) -> bool:
        """Do what came in since the last step, waiting for something when there is nothing to do; False to stop."""
        if not self._wait(_IDLE_S):
            # The moment to look at itself: it takes as long as some steps, and nobody waits for it.
            self._engine.check_integrity()
            self._wait()
        with self._wake:
            jobs = list(self._inbox)
            self._inbox.clear()
        for job in jobs:
            job()
        return not self._stopping

    def _wait(self, most_s: float = math.inf) -> bool:
        """Until there is something to do; False if there was nothing for so long."""
        end_s = time.monotonic() + most_s
        with self._wake:
            while not (self._inbox or self._stopping or self._engine.has_work):
                left_s = end_s - time.monotonic()
                if left_s <= 0:
                    return False
                if (deadline_s := self._engine.next_deadline_s) is not None:
                    left_s = min(left_s, max(0.0, deadline_s - time.monotonic()))
                self._wake.wait(None if left_s == math.inf else left_s)
        return True

    def _submit(self, request: GenerateRequest) -> None:
        try:
            self._engine.submit(request)
        except Exception as error:
            # Whatever a prompt can do to a tokenizer is that request's trouble alone.
            self._loop.call_soon_threadsafe(self._put_error, [request.request_id], error)

    def _deliver(self, outputs: list[StepOutput]) -> None:
        if outputs:
            self._loop.call_soon_threadsafe(self._put_chunks, outputs)

    def _put_chunks(self, outputs: list[StepOutput]) -> None:
        for output in outputs:
            # The client of a missing one left between the step and now.
            if (answer := self._answers.get(output.request_id)) is not None:
                answer.put_nowait(output.error or output.chunk)

    def _put_error(self, request_ids: Iterable[str], error: Exception) -> None:
        for request_id in request_ids:
            if (answer := self._answers.get(request_id)) is not None:
                answer.put_nowait(error)

    def _fail_all(self) -> None:
        self._put_error(self._answers, ReplicaLost(_FAILED))

    def _ask_for_adapters(self) -> None:
        wanted = tuple(ref for ref in self._engine.wanted_adapters() if ref not in self._fetching)
        if wanted:
            self._fetching.update(wanted)
            self._loop.call_soon_threadsafe(self._start_fetch, wanted)
        if self._prefetch is not None and (upcoming := self._engine.upcoming_adapters()) != self._upcoming:
            self._upcoming = upcoming
            self._loop.call_soon_threadsafe(self._prefetch, upcoming)

    def _start_fetch(self, refs: tuple[AdapterRef, ...]) -> None:
        task = self._loop.create_task(self._bring(refs))
        self._fetches.add(task)
        task.add_done_callback(self._fetches.discard)

    async def _bring(self, refs: tuple[AdapterRef, ...]) -> None:
        left = set(refs)
        why: ZephyraError = AdapterUnavailable("An adapter that the request needs could not be fetched; try again.")
        try:
            async for ref, loaded in self._fetch(refs):
                left.discard(ref)
                # Beside the engine's thread: checking and copying an adapter takes as long as a step.
                prepared = await asyncio.to_thread(self._prepared, ref, loaded)
                self._send(partial(self._take_adapter, ref, prepared))
        except ZephyraError as error:
            why = error
        except Exception:
            logger.exception("Fetching %s failed.", ", ".join(map(str, refs)))
        # Whatever happened, the requests that wait for these must hear of it.
        for ref in left:
            self._send(partial(self._take_adapter, ref, why))

    def _prepared(self, ref: AdapterRef, loaded: AdapterWeights | ZephyraError) -> Resident | ZephyraError:
        if isinstance(loaded, ZephyraError):
            return loaded
        try:
            return self._engine.prepare_adapter(ref, loaded)
        except ZephyraError as error:
            return error

    def _take_adapter(self, ref: AdapterRef, prepared: Resident | ZephyraError) -> None:
        self._fetching.discard(ref)
        if not isinstance(prepared, ZephyraError):
            try:
                self._engine.add_prepared(ref, prepared)
                # Only now does anything leave the bank.
                self._resident = self._engine.stats().resident_adapters
                return
            except ZephyraError as error:
                prepared = error
        dropped = self._engine.fail_adapter(ref)
        self._loop.call_soon_threadsafe(self._put_error, dropped, prepared)


def _joined(first: TokenChunk, second: TokenChunk) -> TokenChunk:
    return TokenChunk(
        first.token_ids + second.token_ids,
        first.text + second.text,
        second.finish_reason,
        second.prompt_tokens,
        first.logprobs + second.logprobs,
    )
