"""The KV cache alone: random rows come and go, against a plain list of tensors."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.engine.kv_cache import KvCache

LAYERS, HEADS, WIDTH, MAX_ROWS, MAX_TOKENS = 2, 2, 3, 4, 200

_operation = st.tuples(st.just("prefill"), st.integers(1, 150)) | st.tuples(
    st.sampled_from(["decode", "free"]), st.integers(0, 3)
)


def new_states(num_rows: int, num_tokens: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(num_rows, HEADS, num_tokens, WIDTH, generator=generator)


@settings(deadline=None, max_examples=60)
@given(operations=st.lists(_operation, max_size=25), seed=st.integers(0, 1000))
def test_rows_hold_what_was_written(operations, seed):
    generator = torch.Generator().manual_seed(seed)
    cache = KvCache(LAYERS, MAX_ROWS, MAX_TOKENS)
    rows: list[list[torch.Tensor]] = []  # per row, per layer: [heads, tokens, width]
    for operation, number in operations:
        if operation == "prefill" and len(rows) < MAX_ROWS:
            assert cache.begin_prefill(number) == len(rows)
            states = [new_states(1, number, generator) for _ in range(LAYERS)]
            for layer, state in enumerate(states):
                keys, values = cache.transformers_cache.update(state, -state, layer)
                assert torch.equal(keys, state)
                assert torch.equal(values, -state)
            rows.append([state[0] for state in states])
        elif operation == "decode" and rows and max(r[0].shape[1] for r in rows) < MAX_TOKENS:
            positions = cache.begin_decode(torch.device("cpu"))
            assert positions.tolist() == [row[0].shape[1] for row in rows]
            for layer in range(LAYERS):
                state = new_states(len(rows), 1, generator)
                keys, values = cache.transformers_cache.update(state, -state, layer)
                for index, row in enumerate(rows):
                    row[layer] = torch.cat([row[layer], state[index]], dim=1)
                    length = row[layer].shape[1]
                    assert torch.equal(keys[index, :, :length], row[layer])
                    assert torch.equal(values[index, :, :length], -row[layer])
                    assert not keys[index, :, length:].any()
        elif operation == "free" and number < len(rows):
            cache.free(number)
            rows[number] = rows[-1]
            rows.pop()
        assert cache.lengths == [row[0].shape[1] for row in rows]
        cache.check_integrity()


def test_a_decode_step_reads_a_view_and_memory_follows_use():
    generator = torch.Generator().manual_seed(0)
    cache = KvCache(1, max_rows=64, max_tokens=100_000)
    assert cache.num_bytes == 0
    for _ in range(3):
        cache.begin_prefill(70)
        cache.transformers_cache.update(*[new_states(1, 70, generator)] * 2, 0)
    four_rows_of_128 = 2 * 4 * HEADS * 128 * WIDTH * 4
    assert cache.num_bytes == four_rows_of_128
    pointers = []
    for _ in range(2):
        cache.begin_decode(torch.device("cpu"))
        keys, _ = cache.transformers_cache.update(*[new_states(3, 1, generator)] * 2, 0)
        pointers.append(keys.data_ptr())
    assert pointers[0] == pointers[1]
    assert keys.shape == (3, HEADS, 72, WIDTH)
    assert cache.num_bytes == four_rows_of_128


def test_a_row_left_by_nan_is_zero_again():
    cache = KvCache(1, max_rows=2, max_tokens=100)
    cache.begin_prefill(5)
    cache.transformers_cache.update(*[torch.full((1, HEADS, 5, WIDTH), torch.nan)] * 2, 0)
    cache.free(0)
    cache.check_integrity()
