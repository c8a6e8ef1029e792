"""The engine: `submit` requests, `step` until they have ended. One batch, any mix of mixtures, exactly.

Letters: R tokens whose logits are wanted, B of them whose next token is drawn, N of one given answer, V vocabulary.

Not thread-safe: the caller steps it from one thread. It asks for adapters (`wanted_adapters`) and is given them
(`add_adapter`); where they come from it does not know, nor anything of Ray, routing, catalogs or HTTP.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cluster.config.serving import EngineSettings
from cluster.engine.block_pool import BlockPool
from cluster.engine.intake import Intake
from cluster.engine.native_runner import native_runner
from cluster.engine.runner import Runner
from cluster.engine.sampler import Draw, Sampled, sample, score
from cluster.engine.scheduler import Scheduler
from cluster.engine.sequence import Sequence, SequenceStatus
from cluster.engine.slot_bank import SlotBank
from cluster.engine.torch_runner import TorchRunner
from cluster.engine.vocabulary import Vocabulary
from cluster.errors import (
    DeadlineExceeded,
    IncompatibleAdapter,
    InvalidInput,
    InvalidMixture,
    ZephyraError,
)
from cluster.lora.weights import AdapterWeights, Resident
from cluster.messages import AdapterRef, FinishReason, GenerateRequest, TokenChunk
from cluster.model.base import Base
from cluster.model.servable import check_attention


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step gives one request."""

    request_id: str
    chunk: TokenChunk
    error: ZephyraError | None = None
    """Why the request could not be run, where the engine itself gave it up; its chunk then says ERROR."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The state of an engine at one moment, and counts since it was made."""

    num_running: int
    num_waiting: int
    resident_adapters: tuple[AdapterRef, ...]
    """Least recently used first."""
    adapter_bytes: int
    """Of the resident adapters: what the budget bounds."""
    weight_bytes: int
    """Of the base's weights."""
    kv_cache_bytes: int
    """Of all blocks; memory is taken as they are first used."""
    num_kv_blocks: int
    num_free_kv_blocks: int
    """Those that nothing running holds, whatever could still be reused in them."""
    num_steps: int
    num_prompt_tokens: int
    """Read in chunks, those read again after a preemption included."""
    num_reused_tokens: int
    """Not read, since another sequence's keys and values served."""
    num_generated_tokens: int
    num_finished: int
    num_preemptions: int
    num_evictions: int

    @property
    def kv_used_share(self) -> float:
        """Of all blocks, those that something running holds."""
        return 1 - self.num_free_kv_blocks / self.num_kv_blocks if self.num_kv_blocks else 0.0


class Engine:
    """Continuous batching over sequences with different mixtures."""

    def __init__(self, base: Base, settings: EngineSettings, runner: Runner[Any] | None = None) -> None:
        """Takes `base.model` over: its weights are packed or its layers wrapped, so a model belongs to one engine.

        `runner` replaces the one that fits best, so that a test can look at logits. Raises `InvalidInput` for a
        context beyond the model's, or a model that no runner can run.
        """
        self._base = base
        self.max_tokens = max_tokens_of(base, settings)
        self._runner = runner or make_runner(base.model, settings, self.max_tokens)
        self._bank: SlotBank[Any] = SlotBank(settings.adapter_bytes, on_evict=self._runner.forget)
        self._pool = BlockPool(self._runner.num_kv_blocks, settings.reuse_prefixes)
        self._scheduler = Scheduler(self._bank, self._pool, settings, base.fingerprint)
        self._eos_ids = end_of_sequence_ids(base)
        self._vocabulary = Vocabulary(base.tokenizer)
        self._intake = Intake(base, self.max_tokens)
        self._given_up: list[StepOutput] = []
        self._num_steps = self._num_prompt_tokens = self._num_reused_tokens = 0
        self._num_generated_tokens = self._num_finished = 0

    def submit(self, request: GenerateRequest) -> None:
        """Queue a request.

        Raises `InvalidInput` for an empty prompt or answer, an id in use or a token that the model does not have,
        `PromptTooLong` when prompt and max_tokens, or the given answer, exceed the context, `InvalidMixture` when its
        adapters are known not to fit, `Overloaded` when the queue is full.
        """
        sequence = self._intake.sequence(request)
        if (error := self._mixture_error(sequence)) is not None:
            raise error
        self._scheduler.enqueue(sequence)

    def cancel(self, request_id: str) -> None:
        """Free all that the request holds; no chunk of it follows. Unknown and finished ids are ignored."""
        self._given_up = [output for output in self._given_up if output.request_id != request_id]
        if (waiting := self._scheduler.withdraw(request_id)) is not None:
            waiting.status = SequenceStatus.CANCELLED
        for sequence in [s for s in self._scheduler.running if s.request_id == request_id]:
            self._scheduler.retire(sequence, SequenceStatus.CANCELLED)

    @property
    def has_work(self) -> bool:
        """Whether a step would do something now; if not, wait for a request, an adapter or `next_deadline_s`."""
        deadline_s = self.next_deadline_s
        overdue = deadline_s is not None and deadline_s <= time.monotonic()
        return bool(self._given_up) or overdue or self._scheduler.can_schedule()

    @property
    def next_deadline_s(self) -> float | None:
        """The instant of `time.monotonic()` at which the next request times out, if any can."""
        return self._scheduler.next_deadline_s

    @torch.no_grad()
    def step(self) -> list[StepOutput]:
        """One token for every sequence whose prompt has been read, and a piece of the prompts of others.

        Given answers are read like prompts, and scored on the way. A request's chunk comes once it has text or is the
        last; until then its token ids wait with the text, so that what has arrived of both always belongs together.
        """
        outputs, self._given_up = self._given_up, []
        outputs += [_timed_out(sequence) for sequence in self._scheduler.expired(time.monotonic())]
        chunks = self._scheduler.schedule()
        if not chunks:
            return outputs
        self._num_steps += 1
        wanted = [(chunk.sequence, chunk.num_wanted) for chunk in chunks if chunk.num_wanted]
        for chunk in chunks:
            if chunk.num_tokens > 1 or not chunk.sequence.generated_ids:
                self._num_prompt_tokens += chunk.num_tokens
            if chunk.sequence.num_computed == chunk.sequence.num_reused:
                self._num_reused_tokens += chunk.sequence.num_reused
        logits_RV = self._runner.run(chunks, self._bank.resident)
        for chunk in chunks:
            self._scheduler.computed(chunk)
        ending = [sequence for sequence, _ in wanted if not sequence.answer_ids]
        if len(ending) < len(wanted):
            logits_RV = self._score_answers(wanted, logits_RV, outputs)
        draws = [Draw(s.sampling, s.seed, s.num_tokens, s.prompt_ids, s.generated_ids) for s in ending]
        for sequence, sampled in zip(ending, sample(logits_RV, draws), strict=True):
            if (piece := self._accept(sequence, sampled)) is not None:
                outputs.append(StepOutput(sequence.request_id, piece))
        return outputs

    def wanted_adapters(self) -> tuple[AdapterRef, ...]:
        """The adapters to fetch now: queued sequences need them, they are not resident, and room can be made.

        In the order of the queue, without repeats. One that must wait for running sequences to release their
        adapters is named once they have.
        """
        return self._scheduler.wanted()

    def upcoming_adapters(self) -> tuple[AdapterRef, ...]:
        """The adapters that will be wanted once there is room, the next first: worth having at hand by then."""
        return self._scheduler.upcoming()

    def prepare_adapter(self, ref: AdapterRef, weights: AdapterWeights) -> Resident:
        """The adapter as the engine holds it, to be given to `add_prepared`. May be called from any thread.

        Raises `IncompatibleAdapter` when it belongs to another base or does not fit the layers; `CorruptArtifact` when
        it is not finite.
        """
        if not weights.factors:
            raise IncompatibleAdapter(f"The adapter {ref} changes no layer; expected factors for at least one.")
        weights.check_fits(self._runner.layers, self._base.fingerprint)
        weights.check_finite()
        prepared: Resident = self._runner.prepare(weights)
        return prepared

    def add_prepared(self, ref: AdapterRef, prepared: Resident) -> None:
        """Make an adapter resident, evicting the least recently used ones.

        Adapters in use, or needed by sequences earlier in the queue, are not evicted; when the rest is not enough,
        this one is not kept, and is wanted again when there is room. Raises `IncompatibleAdapter` when it exceeds the
        budget alone.
        """
        self._bank.add(ref, prepared, spare=self._scheduler.spared_for(ref))
        for sequence in [s for s in self._scheduler.waiting.values() if ref in s.refs]:
            if (error := self._mixture_error(sequence)) is not None:
                self._give_up(sequence, error)

    def add_adapter(self, ref: AdapterRef, weights: AdapterWeights) -> None:
        """`prepare_adapter` and `add_prepared` in one, with the errors of both."""
        self.add_prepared(ref, self.prepare_adapter(ref, weights))

    def fail_adapter(self, ref: AdapterRef) -> list[str]:
        """The adapter cannot be had: drop the queued requests that need it, and return their ids.

        Running ones hold theirs already. No chunk follows for those dropped: the caller knows why.
        """
        dropped = [sequence for sequence in self._scheduler.waiting.values() if ref in sequence.refs]
        for sequence in dropped:
            self._scheduler.withdraw(sequence.request_id)
            sequence.status = SequenceStatus.DROPPED
        return [sequence.request_id for sequence in dropped]

    def stats(self) -> EngineStats:
        """What the engine holds and has done."""
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            resident_adapters=tuple(self._bank.resident),
            adapter_bytes=self._bank.used_bytes,
            weight_bytes=self._runner.weight_bytes,
            kv_cache_bytes=self._runner.num_kv_blocks * self._runner.kv_block_bytes,
            num_kv_blocks=self._runner.num_kv_blocks,
            num_free_kv_blocks=self._pool.num_free,
            num_steps=self._num_steps,
            num_prompt_tokens=self._num_prompt_tokens,
            num_reused_tokens=self._num_reused_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_finished=self._num_finished,
            num_preemptions=self._scheduler.num_preemptions,
            num_evictions=self._bank.num_evictions,
        )

    def check_integrity(self) -> None:
        """Assert what must hold between steps, on the real objects: queues, blocks, pins, bytes, statuses."""
        self._scheduler.check_integrity()

    def _score_answers(
        self, wanted: list[tuple[Sequence, int]], logits_RV: Tensor, outputs: list[StepOutput]
    ) -> Tensor:
        """Take the rows of those whose answer is given; return the others' [B, V]. What has ended goes to `outputs`."""
        others = [logits_RV[:0]]
        for (sequence, _), logits_NV in zip(wanted, logits_RV.split([count for _, count in wanted]), strict=True):
            if not sequence.answer_ids:
                others.append(logits_NV)
            elif (output := self._scored(sequence, logits_NV)) is not None:
                outputs.append(output)
        return torch.cat(others)

    def _scored(self, sequence: Sequence, logits_NV: Tensor) -> StepOutput | None:
        """Add the log-probabilities of the next tokens of its answer; return what to send once it is complete."""
        start = sequence.num_computed - len(logits_NV) - sequence.first_wanted
        sampled = score(logits_NV, sequence.answer_ids[start : start + len(logits_NV)])
        # Those it had before it was preempted are computed anew.
        del sequence.logprobs[start:]
        sequence.logprobs += [self._vocabulary.token_logprob(one) for one in sampled if one is not None]
        is_broken = None in sampled
        if not is_broken and len(sequence.logprobs) < len(sequence.answer_ids):
            return None
        self._scheduler.retire(sequence, SequenceStatus.FINISHED)
        self._num_finished += 1
        if is_broken:
            why = "Under this mixture the model gives logits that are not finite numbers; give it smaller weights."
            return _failed(sequence, InvalidMixture(why))
        text = sequence.detokenizer.push(sequence.answer_ids) + sequence.detokenizer.finish()
        prompt_tokens = sequence.first_wanted + 1
        chunk = TokenChunk(sequence.answer_ids, text, FinishReason.STOP, prompt_tokens, tuple(sequence.logprobs))
        return StepOutput(sequence.request_id, chunk)

    def _accept(self, sequence: Sequence, sampled: Sampled | None) -> TokenChunk | None:
        """Add the sampled token to its sequence; return the chunk to send, if there is one."""
        reason: FinishReason | None = FinishReason.ERROR
        text = ""
        if sampled is not None:
            sequence.generated_ids.append(sampled.token_id)
            if sampled.logprob is not None:
                sequence.logprobs.append(self._vocabulary.token_logprob(sampled))
            self._num_generated_tokens += 1
            text = sequence.detokenizer.push([sampled.token_id])
            reason = self._finish_reason(sequence)
        if reason is not None:
            text += sequence.detokenizer.finish()
            self._scheduler.retire(sequence, SequenceStatus.FINISHED)
            self._num_finished += 1
        elif not text:
            return None
        token_ids = tuple(sequence.generated_ids[sequence.num_emitted :])
        logprobs = tuple(sequence.logprobs[sequence.num_emitted :])
        sequence.num_emitted += len(token_ids)
        prompt_tokens = 0 if reason is None else len(sequence.prompt_ids)
        return TokenChunk(token_ids, text, reason, prompt_tokens, logprobs)

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        sampling = sequence.sampling
        ends = sequence.last_id in self._eos_ids and not sampling.ignore_eos
        if ends or sequence.detokenizer.stopped or sequence.last_id in sampling.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(sequence.generated_ids) == sampling.max_tokens else None

    def _give_up(self, sequence: Sequence, error: ZephyraError) -> None:
        self._scheduler.withdraw(sequence.request_id)
        sequence.status = SequenceStatus.DROPPED
        self._given_up.append(_failed(sequence, error))

    def _mixture_error(self, sequence: Sequence) -> InvalidMixture | None:
        needed_bytes = self._bank.known_bytes(sequence.refs)
        if needed_bytes <= self._bank.budget_bytes:
            return None
        return InvalidMixture(
            f"The mixture's {len(sequence.refs)} adapters have at least {needed_bytes} bytes and must be resident "
            f"together, in {self._bank.budget_bytes}; mix fewer, or raise adapter_bytes in the engine's settings."
        )


def max_tokens_of(base: Base, settings: EngineSettings) -> int:
    """Prompt and answer together. Raises `InvalidInput` when the settings ask for more than the base was made for."""
    max_tokens = settings.max_context_tokens or base.context_tokens
    if max_tokens > base.context_tokens:
        raise InvalidInput(
            f"max_context_tokens is {max_tokens}; the base was made for {base.context_tokens}, the most."
        )
    return max_tokens


@torch.no_grad()
def make_runner(model: PreTrainedModel, settings: EngineSettings, max_tokens: int) -> Runner[Any]:
    """The fastest runner that can run `model`, which belongs to it from then on.

    Raises `InvalidInput` for a model that none can.
    """
    check_attention(model, max_tokens)
    return native_runner(model, settings, max_tokens) or TorchRunner(model, settings, max_tokens)


def end_of_sequence_ids(base: Base) -> frozenset[int]:
    """The tokens that end an answer: whatever the generation settings, the configuration and the tokenizer name."""
    named: list[int] = []
    for source in (base.model.generation_config, base.model.config, base.tokenizer):
        ids = getattr(source, "eos_token_id", None)
        named += ids if isinstance(ids, list | tuple) else [] if ids is None else [ids]
    return frozenset(named)


def _failed(sequence: Sequence, error: ZephyraError) -> StepOutput:
    chunk = TokenChunk((), "", FinishReason.ERROR, len(sequence.prompt_ids))
    return StepOutput(sequence.request_id, chunk, error)


def _timed_out(sequence: Sequence) -> StepOutput:
    num_generated = len(sequence.generated_ids)
    why = f"The request timed out after {num_generated} tokens; allow it more time, or ask for fewer."
    return _failed(sequence, DeadlineExceeded(why))
