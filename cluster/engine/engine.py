"""The engine: `submit` requests, `step` until they have ended. One batch, any mix of mixtures, exactly.

Not thread-safe: the caller steps it from one thread. It asks for adapters (`wanted_adapters`) and is given them
(`add_adapter`); where they come from it does not know, nor anything of Ray, routing, catalogs or HTTP.
"""

import secrets
from collections import Counter
from dataclasses import dataclass

import torch

from cluster.config import EngineSettings
from cluster.engine.detokenizer import Detokenizer
from cluster.engine.runner import Runner
from cluster.engine.sampler import Draw, sample
from cluster.engine.scheduler import Scheduler
from cluster.engine.sequence import Sequence, SequenceStatus
from cluster.engine.slot_bank import SlotBank
from cluster.errors import IncompatibleAdapter, InvalidInput, InvalidMixture, PromptTooLong, ZephyraError
from cluster.lora.weights import AdapterWeights, Factors
from cluster.messages import AdapterRef, FinishReason, GenerateRequest, TokenChunk, check_prompt
from cluster.model.base import Base, encode_prompt


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
    stacked_adapter_bytes: int
    """Copies of active adapters, side by side for the products; beside the budget."""
    kv_cache_bytes: int
    num_steps: int
    num_prompt_tokens: int
    num_generated_tokens: int
    num_finished: int
    num_evictions: int


class Engine:
    """Continuous batching over sequences with different mixtures."""

    def __init__(self, base: Base, settings: EngineSettings, runner: Runner | None = None) -> None:
        """Wrap the linear layers of `base.model` in place: a model belongs to one engine.

        `runner` replaces the default one, so that a test can look at logits. Raises `InvalidInput` for a context
        beyond the model's, or a model that the runner cannot run.
        """
        self._base = base
        self.max_tokens = settings.max_context_tokens or base.context_tokens
        if self.max_tokens > base.context_tokens:
            raise InvalidInput(
                f"max_context_tokens is {self.max_tokens}; the base was made for {base.context_tokens}, the most."
            )
        self._runner = runner or Runner(base.model, settings.max_batch_size, self.max_tokens)
        self._bank = SlotBank(settings.adapter_bytes, on_evict=self._runner.mixed_batch.forget)
        self._scheduler = Scheduler(self._bank, settings.max_batch_size, settings.max_waiting)
        self._eos_ids = end_of_sequence_ids(base)
        self._longest_token = max(len(token) for token in base.tokenizer.get_vocab())
        self._given_up: list[StepOutput] = []
        self._num_steps = self._num_prompt_tokens = self._num_generated_tokens = self._num_finished = 0

    def submit(self, request: GenerateRequest) -> None:
        """Queue a request.

        Raises `InvalidInput` for an empty prompt or an id in use, `PromptTooLong` when prompt and max_tokens exceed
        the context, `InvalidMixture` when its adapters are known not to fit, `Overloaded` when the queue is full.
        """
        check_prompt(request.prompt)
        self._check_characters(request)
        prompt_ids = encode_prompt(self._base.tokenizer, request.prompt)
        if not prompt_ids:
            raise InvalidInput("The prompt has no tokens; give at least one.")
        if len(prompt_ids) + request.sampling.max_tokens > self.max_tokens:
            raise PromptTooLong(
                f"The prompt has {len(prompt_ids)} tokens and max_tokens is {request.sampling.max_tokens}: together "
                f"more than the context of {self.max_tokens}; shorten one of them."
            )
        seed = request.sampling.seed
        sequence = Sequence(
            request_id=request.request_id,
            prompt_ids=prompt_ids,
            mixture=request.mixture,
            sampling=request.sampling,
            seed=secrets.randbits(63) if seed is None else seed,
            detokenizer=Detokenizer(self._base.tokenizer, request.sampling.stop),
        )
        if (error := self._mixture_error(sequence)) is not None:
            raise error
        self._scheduler.enqueue(sequence)

    def _check_characters(self, request: GenerateRequest) -> None:
        """Raise `PromptTooLong` for a prompt that cannot fit however it is cut into tokens.

        Tokenizing a megabyte takes a second, in which no other sequence would get its next token.
        """
        prompt = request.prompt
        size = len(prompt) if isinstance(prompt, str) else sum(len(message.content) for message in prompt)
        least = -(-size // self._longest_token)
        if least + request.sampling.max_tokens > self.max_tokens:
            raise PromptTooLong(
                f"The prompt has {size} characters, at least {least} tokens, and max_tokens is "
                f"{request.sampling.max_tokens}: together more than the context of {self.max_tokens}; shorten either."
            )

    def cancel(self, request_id: str) -> None:
        """Free all that the request holds; no chunk of it follows. Unknown and finished ids are ignored."""
        self._given_up = [output for output in self._given_up if output.request_id != request_id]
        waiting = self._scheduler.waiting.pop(request_id, None)
        if waiting is not None:
            waiting.status = SequenceStatus.CANCELLED
        for sequence in [s for s in self._scheduler.running if s.request_id == request_id]:
            self._retire(sequence, SequenceStatus.CANCELLED)

    @property
    def has_work(self) -> bool:
        """Whether a step would do something now; if not, wait for a request or an adapter."""
        return bool(self._given_up or self._scheduler.running) or self._scheduler.can_admit()

    def step(self) -> list[StepOutput]:
        """One token for every running sequence, the first one for those admitted now.

        A request's chunk comes once it has text or is the last; until then its token ids wait with the text, so that
        what has arrived of both always belongs together.
        """
        decoding = list(self._scheduler.running)
        admitted = self._scheduler.admit()
        outputs, self._given_up = self._given_up, []
        if not (decoding or admitted):
            return outputs
        logits = [self._runner.decode(decoding, self._bank.resident)] if decoding else []
        logits += [self._runner.prefill(sequence, self._bank.resident).unsqueeze(0) for sequence in admitted]
        running = decoding + admitted
        tokens = sample(torch.cat(logits), [Draw(s.sampling, s.seed, s.num_tokens) for s in running])
        self._num_steps += 1
        self._num_prompt_tokens += sum(len(sequence.prompt_ids) for sequence in admitted)
        chunks = [(s.request_id, self._accept(s, token)) for s, token in zip(running, tokens, strict=True)]
        return outputs + [StepOutput(request_id, chunk) for request_id, chunk in chunks if chunk is not None]

    def wanted_adapters(self) -> tuple[AdapterRef, ...]:
        """The adapters to fetch now: queued sequences need them, they are not resident, and room can be made.

        In the order of the queue, without repeats. One that must wait for running sequences to release their
        adapters is named once they have.
        """
        return self._scheduler.wanted()

    def add_adapter(self, ref: AdapterRef, weights: AdapterWeights) -> None:
        """Make an adapter resident, in the base's dtype and on its device, evicting the least recently used ones.

        Adapters in use, or needed by sequences earlier in the queue, are not evicted; when the rest is not enough,
        this one is not kept, and is wanted again when there is room. Raises `IncompatibleAdapter` when it belongs to
        another base, does not fit the layers or exceeds the budget alone; `CorruptArtifact` when it is not finite.
        """
        if not weights.factors:
            raise IncompatibleAdapter(f"The adapter {ref} changes no layer; expected factors for at least one.")
        weights.check_fits(self._runner.layers, self._base.fingerprint)
        weights = _converted(weights, self._base.model.dtype, self._base.model.device)
        weights.check_finite()
        self._bank.add(ref, weights, spare=self._scheduler.spared_for(ref))
        for sequence in [s for s in self._scheduler.waiting.values() if ref in s.refs]:
            if (error := self._mixture_error(sequence)) is not None:
                self._give_up(sequence, error)

    def fail_adapter(self, ref: AdapterRef) -> list[str]:
        """The adapter cannot be had: drop the queued requests that need it, and return their ids.

        Running ones hold theirs already. No chunk follows for those dropped: the caller knows why.
        """
        dropped = [sequence for sequence in self._scheduler.waiting.values() if ref in sequence.refs]
        for sequence in dropped:
            del self._scheduler.waiting[sequence.request_id]
            sequence.status = SequenceStatus.DROPPED
        return [sequence.request_id for sequence in dropped]

    def stats(self) -> EngineStats:
        """What the engine holds and has done."""
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            resident_adapters=tuple(self._bank.resident),
            adapter_bytes=self._bank.used_bytes,
            stacked_adapter_bytes=self._runner.mixed_batch.stacked_bytes,
            kv_cache_bytes=self._runner.kv_cache.num_bytes,
            num_steps=self._num_steps,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_finished=self._num_finished,
            num_evictions=self._bank.num_evictions,
        )

    def check_integrity(self) -> None:
        """Assert what must hold between steps, on the real objects: rows, lengths, pins, bytes, statuses."""
        running, waiting = self._scheduler.running, self._scheduler.waiting
        assert [sequence.row for sequence in running] == list(range(len(running)))
        assert all(sequence.status is SequenceStatus.RUNNING for sequence in running)
        assert all(s.status is SequenceStatus.WAITING and s.row is None for s in waiting.values())
        assert not {sequence.request_id for sequence in running} & waiting.keys()
        # The newest token is read, and its keys and values written, by the next step.
        assert self._runner.kv_cache.lengths == [sequence.num_tokens - 1 for sequence in running]
        self._runner.kv_cache.check_integrity()
        self._bank.check_integrity(Counter(ref for sequence in running for ref in sequence.refs))
        assert self._runner.mixed_batch.stacked_refs <= self._bank.resident.keys()

    def _accept(self, sequence: Sequence, token: int | None) -> TokenChunk | None:
        """Add the sampled token to its sequence; return the chunk to send, if there is one."""
        reason: FinishReason | None = FinishReason.ERROR
        text = ""
        if token is not None:
            sequence.generated_ids.append(token)
            self._num_generated_tokens += 1
            text = sequence.detokenizer.push([token])
            reason = self._finish_reason(sequence)
        if reason is not None:
            text += sequence.detokenizer.finish()
            self._retire(sequence, SequenceStatus.FINISHED)
            self._num_finished += 1
        elif not text:
            return None
        token_ids = tuple(sequence.generated_ids[sequence.num_emitted :])
        sequence.num_emitted += len(token_ids)
        return TokenChunk(token_ids, text, reason, 0 if reason is None else len(sequence.prompt_ids))

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        if sequence.detokenizer.stopped or sequence.last_id in self._eos_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(sequence.generated_ids) == sequence.sampling.max_tokens else None

    def _retire(self, sequence: Sequence, status: SequenceStatus) -> None:
        assert sequence.row is not None, "a running sequence has a row"
        self._runner.free(sequence.row)
        self._scheduler.retire(sequence)
        sequence.status = status

    def _give_up(self, sequence: Sequence, error: ZephyraError) -> None:
        del self._scheduler.waiting[sequence.request_id]
        sequence.status = SequenceStatus.DROPPED
        chunk = TokenChunk((), "", FinishReason.ERROR, len(sequence.prompt_ids))
        self._given_up.append(StepOutput(sequence.request_id, chunk, error))

    def _mixture_error(self, sequence: Sequence) -> InvalidMixture | None:
        needed_bytes = self._bank.known_bytes(sequence.refs)
        if needed_bytes <= self._bank.budget_bytes:
            return None
        return InvalidMixture(
            f"The mixture's {len(sequence.refs)} adapters have at least {needed_bytes} bytes and must be resident "
            f"together, in {self._bank.budget_bytes}; mix fewer, or raise adapter_bytes in the engine's settings."
        )


def end_of_sequence_ids(base: Base) -> frozenset[int]:
    """The tokens that end an answer: whatever the generation settings, the configuration and the tokenizer name."""
    named: list[int] = []
    for source in (base.model.generation_config, base.model.config, base.tokenizer):
        ids = getattr(source, "eos_token_id", None)
        named += ids if isinstance(ids, list | tuple) else [] if ids is None else [ids]
    return frozenset(named)


def _converted(weights: AdapterWeights, dtype: torch.dtype, device: torch.device) -> AdapterWeights:
    """`weights` as the base's products need them; no copy of what is so already."""
    factors = {
        n: Factors(f.a_RI.to(device, dtype), f.b_OR.to(device, dtype), f.scale) for n, f in weights.factors.items()
    }
    return AdapterWeights(factors, weights.base_fingerprint)
