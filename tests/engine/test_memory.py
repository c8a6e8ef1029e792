"""What a step takes beside weights and cache: for a prompt's token its own mixture's ranks, whoever else is there."""

from pathlib import Path

import pytest

from cluster.config.serving import EngineSettings
from cluster.engine.detokenizer import Detokenizer
from cluster.engine.runner import Runner
from cluster.engine.scheduler import Chunk
from cluster.engine.sequence import Sequence
from cluster.messages import Mixture, SamplingParams
from tests.engine.systems import RUNNERS, make_adapter, make_base, make_runner, ref, tokenizer

PROMPTS, PROMPT_TOKENS = 64, 128
SMALL_RANK, LARGE_RANK = 4, 4096
KV_BLOCK_TOKENS = 16
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def sequence_of(mixture: Mixture, num_tokens: int, first_block: int) -> Sequence:
    sequence = Sequence("r", [7] * num_tokens, mixture, SamplingParams(), 0, Detokenizer(tokenizer()))
    sequence.blocks = list(range(first_block, first_block + -(-num_tokens // KV_BLOCK_TOKENS)))
    return sequence


def resident_bytes(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def peak_growth(runner: Runner, chunks: list[Chunk], resident: dict) -> int:
    """By how much the process grows during a step, at its highest."""
    CLEAR_REFS.write_text("5")  # the peak is counted anew
    before = resident_bytes("VmRSS")
    runner.run(chunks, resident)
    return resident_bytes("VmHWM") - before


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="Linux counts the peak")
@pytest.mark.parametrize("name", RUNNERS)
def test_a_large_rank_beside_them_costs_the_prompts_nothing(name):
    base = make_base("zephyra")
    small = make_adapter(base.model, 1, SMALL_RANK)
    large = make_adapter(base.model, 2, LARGE_RANK)
    num_blocks = (PROMPTS + 1) * PROMPT_TOKENS // KV_BLOCK_TOKENS
    runner = make_runner(name, base, EngineSettings(max_batch_size=PROMPTS + 1), num_blocks)
    resident = {ref("small"): runner.prepare(small), ref("large"): runner.prepare(large)}
    blocks_each = PROMPT_TOKENS // KV_BLOCK_TOKENS
    prompts = [
        Chunk(sequence_of(Mixture.of({ref("small"): 1.0}), PROMPT_TOKENS, index * blocks_each), PROMPT_TOKENS)
        for index in range(PROMPTS)
    ]
    alone = Chunk(sequence_of(Mixture.of({ref("large"): 1.0}), 1, PROMPTS * blocks_each), 1)
    runner.run([alone], resident)  # whatever copy of the large adapter a runner makes is there now
    of_prompts = peak_growth(runner, prompts, resident)
    padded_bytes = PROMPTS * PROMPT_TOKENS * LARGE_RANK * 4
    assert peak_growth(runner, [alone, *prompts], resident) - of_prompts < padded_bytes / 8
