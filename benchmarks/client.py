"""Plays requests against one engine and notes when tokens came. Steps it and brings it adapters as a replica does:
read in a thread of their own while the engine goes on stepping. Knows nothing of what is measured.
"""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue

import torch

from cluster.engine.engine import Engine, StepOutput
from cluster.lora.foreign import read_handed_in
from cluster.lora.peft_format import unpack
from cluster.lora.weights import AdapterWeights, Resident
from cluster.messages import AdapterRef, GenerateRequest


@dataclass(frozen=True, slots=True)
class AdapterLibrary:
    """Adapters on disk, in PEFT's layout, that belong to one base."""

    folders: Mapping[AdapterRef, Path]
    base_fingerprint: str
    dtype: torch.dtype

    def load(self, ref: AdapterRef) -> AdapterWeights:
        """Read one from its files."""
        return unpack(read_handed_in(self.folders[ref], self.base_fingerprint), self.dtype)


@dataclass(slots=True)
class Timeline:
    """When things happened to one request; seconds since the play began."""

    arrived_s: float
    """When it was to be sent, which may lie before the step that kept it waiting."""
    first_s: float | None = None
    """When its first tokens came."""
    last_s: float | None = None
    num_tokens: int = 0

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        assert self.first_s is not None, "the request has ended"
        return self.first_s - self.arrived_s


@dataclass(slots=True)
class Played:
    """What was seen of one play."""

    timelines: dict[str, Timeline] = field(default_factory=dict)
    made: list[tuple[float, int]] = field(default_factory=list)
    """When each step ended, and how many tokens it gave all requests together."""

    @property
    def tokens_per_s(self) -> float:
        """All tokens over the time to the last."""
        return self.tokens_between(0.0, self.made[-1][0]) / self.made[-1][0]

    @property
    def decode_tokens_per_s(self) -> float:
        """The tokens after the first step that gave any, over the time from it to the last."""
        first_s, last_s = self.made[0][0], self.made[-1][0]
        return self.tokens_between(first_s, last_s) / (last_s - first_s)

    def tokens_between(self, start_s: float, end_s: float) -> int:
        """Tokens after `start_s`, up to and at `end_s`."""
        return sum(num_tokens for time_s, num_tokens in self.made if start_s < time_s <= end_s)


class Client:
    """Sends requests to an engine that no one else steps."""

    def __init__(self, engine: Engine, library: AdapterLibrary) -> None:
        self._engine = engine
        self._library = library
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapters")
        self._read: SimpleQueue[tuple[AdapterRef, Future[Resident]]] = SimpleQueue()
        self._reading: set[AdapterRef] = set()

    def play(
        self, requests: Sequence[GenerateRequest], in_flight: int, arrivals_s: Sequence[float] | None = None
    ) -> Played:
        """Send `requests` in order, each once it is due and fewer than `in_flight` are unanswered, until all have
        their tokens. Without `arrivals_s` all are due at once.
        """
        due = deque(zip(arrivals_s or [0.0] * len(requests), requests, strict=True))
        max_tokens = {request.request_id: request.sampling.max_tokens for request in requests}
        played, open_ids, start_s = Played(), set[str](), time.perf_counter()
        while due or open_ids:
            now_s = time.perf_counter() - start_s
            while due and due[0][0] <= now_s and len(open_ids) < in_flight:
                arrival_s, request = due.popleft()
                self._engine.submit(request)
                open_ids.add(request.request_id)
                played.timelines[request.request_id] = Timeline(now_s if arrivals_s is None else arrival_s)
            self._ask_for_adapters()
            self._wait(due[0][0] - now_s if due and len(open_ids) < in_flight else None)
            if self._engine.has_work:
                open_ids -= self._step(played, start_s)
        wrong = {
            name: line.num_tokens for name, line in played.timelines.items() if line.num_tokens != max_tokens[name]
        }
        assert not wrong, f"requests ended with another number of tokens than they asked for: {wrong}"
        return played

    def register(self, refs: Sequence[AdapterRef]) -> None:
        """Make adapters resident before any request needs them."""
        for ref in refs:
            self._engine.add_adapter(ref, self._library.load(ref))

    def close(self) -> None:
        """End the reading thread."""
        self._reader.shutdown()

    def _step(self, played: Played, start_s: float) -> set[str]:
        """One step of the engine, noted in `played`; returns the requests that it ended."""
        before = self._engine.stats().num_generated_tokens
        outputs = self._engine.step()
        now_s = time.perf_counter() - start_s
        if num_tokens := self._engine.stats().num_generated_tokens - before:
            played.made.append((now_s, num_tokens))
        return {ended for output in outputs if (ended := _note(played, output, now_s)) is not None}

    def _ask_for_adapters(self) -> None:
        for ref in self._engine.wanted_adapters():
            if ref not in self._reading:
                self._reading.add(ref)
                future = self._reader.submit(self._prepared, ref)
                future.add_done_callback(partial(self._note_read, ref))

    def _prepared(self, ref: AdapterRef) -> Resident:
        """Called in the reading thread."""
        return self._engine.prepare_adapter(ref, self._library.load(ref))

    def _note_read(self, ref: AdapterRef, future: Future[Resident]) -> None:
        """Called in the reading thread."""
        self._read.put((ref, future))

    def _wait(self, until_due_s: float | None) -> None:
        """Hand over the adapters that have been read; with nothing to step, wait for one or for the next request."""
        if not self._engine.has_work and not self._reading:
            assert until_due_s is not None, "the engine came to a halt with work left"
            time.sleep(max(0.0, until_due_s))
        while self._reading:
            try:
                ref, future = self._read.get(
                    block=not self._engine.has_work, timeout=None if until_due_s is None else max(0.0, until_due_s)
                )
            except Empty:
                return
            self._reading.discard(ref)
            self._engine.add_prepared(ref, future.result())


def _note(played: Played, output: StepOutput, now_s: float) -> str | None:
    """Write down what came; return the request's id if that was its last."""
    if output.error is not None:
        raise output.error
    chunk, timeline = output.chunk, played.timelines[output.request_id]
    if chunk.token_ids:
        timeline.num_tokens += len(chunk.token_ids)
        timeline.first_s = now_s if timeline.first_s is None else timeline.first_s
    if chunk.finish_reason is None:
        return None
    timeline.last_s = now_s
    return output.request_id
