"""Given answers to one prompt, scored by one engine: as many sequences in its batch as there are answers."""

import asyncio
import math
import time
from contextlib import aclosing

from cluster.messages import AnswerScore, AnswerScores, GenerateRequest, SamplingParams, ScoreRequest, TokenChunk
from deployments.replica.engine_loop import EngineLoop


async def scored(engine: EngineLoop, request: ScoreRequest, at_once: int) -> AnswerScores:
    """How likely each answer is. Cancelling it, or an error of one answer, takes all of them out of the batch.

    At most `at_once` wait or run at a time, so that one request leaves the engine's queue to others. Raises what
    `EngineLoop.generate` raises.
    """
    start_s = time.monotonic()
    places = asyncio.Semaphore(at_once)

    async def score(index: int) -> TokenChunk:
        async with places:
            asked = GenerateRequest(
                f"{request.request_id}-{index}",
                request.prompt,
                request.mixture,
                SamplingParams(),
                request.priority,
                None if request.timeout_s is None else request.timeout_s - (time.monotonic() - start_s),
                answer=request.answers[index],
            )
            async with aclosing(engine.generate(asked)) as chunks:
                return await anext(chunks)

    # The first alone: it leaves the prompt's keys and values behind, which the others then find.
    chunks = [await score(0)]
    others = [asyncio.ensure_future(score(index)) for index in range(1, len(request.answers))]
    try:
        chunks += await asyncio.gather(*others)
    finally:
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)
    return AnswerScores(tuple(map(_score_of, chunks)), chunks[0].prompt_tokens)


def _score_of(chunk: TokenChunk) -> AnswerScore:
    return AnswerScore(math.fsum(token.logprob for token in chunk.logprobs), len(chunk.token_ids))
