"""A request as the engine's sequence: its text cut into tokens, and refused where it cannot be run.

Knows nothing of queues, adapters or what runs.
"""

import secrets
import time

from cluster.engine.detokenizer import Detokenizer
from cluster.engine.sequence import Sequence
from cluster.errors import InvalidInput, PromptTooLong
from cluster.messages import GenerateRequest, Prompt, SamplingParams, check_prompt, check_vocabulary
from cluster.model.base import Base, encode_answer, encode_prompt


class Intake:
    """Makes sequences for one base."""

    def __init__(self, base: Base, max_tokens: int) -> None:
        """`max_tokens` bounds prompt and answer together."""
        self._tokenizer = base.tokenizer
        self._vocab_size = base.model.config.get_text_config().vocab_size
        self._max_tokens = max_tokens
        self._longest_token = max(len(token) for token in base.tokenizer.get_vocab())
        self._last: tuple[Prompt, list[int]] | None = None

    def sequence(self, request: GenerateRequest) -> Sequence:
        """The request's sequence; a passed time limit counts from now.

        Raises `InvalidInput` for an empty prompt or answer, or a token that the model does not have, `PromptTooLong`
        when the prompt and max_tokens, or the given answer, exceed the context.
        """
        check_prompt(request.prompt)
        # To be scored, an answer needs no sampling, and one place beside its tokens but the last.
        sampling = request.sampling if request.answer is None else SamplingParams(max_tokens=1)
        check_vocabulary(sampling, self._vocab_size)
        self._check_characters(request, sampling.max_tokens)
        prompt_ids = self._prompt_ids(request.prompt)
        if not prompt_ids:
            raise InvalidInput("The prompt has no tokens; give at least one.")
        answer_ids = self._answer_ids(request)
        if len(prompt_ids) + (len(answer_ids) or sampling.max_tokens) > self._max_tokens:
            follows = f"the answer has {len(answer_ids)}" if answer_ids else f"max_tokens is {sampling.max_tokens}"
            raise PromptTooLong(
                f"The prompt has {len(prompt_ids)} tokens and {follows}: together more than the context of "
                f"{self._max_tokens}; shorten one of them."
            )
        return Sequence(
            request_id=request.request_id,
            prompt_ids=prompt_ids + list(answer_ids[:-1]),
            mixture=request.mixture,
            sampling=sampling,
            seed=secrets.randbits(63) if sampling.seed is None else sampling.seed,
            detokenizer=Detokenizer(self._tokenizer, sampling.stop),
            priority=request.priority,
            deadline_s=None if request.timeout_s is None else time.monotonic() + request.timeout_s,
            answer_ids=answer_ids,
        )

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        """Those of the last prompt are kept, since many answers to be scored follow the same one."""
        if self._last is None or self._last[0] != prompt:
            self._last = prompt, encode_prompt(self._tokenizer, prompt)
        return self._last[1]

    def _answer_ids(self, request: GenerateRequest) -> tuple[int, ...]:
        """The tokens to score; none where the answer is to be generated."""
        if request.answer is None:
            return ()
        answer_ids = tuple(encode_answer(self._tokenizer, request.answer))
        if not answer_ids:
            raise InvalidInput(f"The answer {request.answer!r} has no tokens to score; give at least one.")
        return answer_ids

    def _check_characters(self, request: GenerateRequest, max_tokens: int) -> None:
        """Raise `PromptTooLong` for a prompt that cannot fit however it is cut into tokens.

        Tokenizing a megabyte takes a second, in which no other sequence would get its next token.
        """
        prompt = request.prompt
        size = len(prompt) if isinstance(prompt, str) else sum(len(message.content) for message in prompt)
        least = -(-size // self._longest_token)
        if least + max_tokens > self._max_tokens:
            raise PromptTooLong(
                f"The prompt has {size} characters, at least {least} tokens, and max_tokens is {max_tokens}: together "
                f"more than the context of {self._max_tokens}; shorten either."
            )
