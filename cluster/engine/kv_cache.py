"""Keys and values of all running sequences, as a transformers Cache. Knows nothing of requests or adapters.

One tensor per layer for keys and one for values, [rows, kv heads, tokens, head size]. Running sequences are kept in
rows 0..n-1, so that a decode step reads one view, [:n, :, :longest], without copying. What no sequence holds is
zero: a masked position still enters a product, and 0 times a NaN left behind would reach the row's next sequence.
Letters: B sequences, K key-value heads, T tokens, H head size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

_FIRST_TOKENS = 64
"""Room in tokens that a new cache starts with; it doubles as sequences grow."""


@dataclass(slots=True)
class _Step:
    """What the forward pass at hand writes and reads; shared by all layers."""

    room_rows: int = 0
    room_tokens: int = 0
    row: int = 0
    """The row that a prefill fills from position 0."""
    rows_B: Tensor | None = None
    """Of a decode step: 0..n-1; None in a prefill."""
    positions_B: Tensor | None = None
    """Of a decode step: where each row's one new token goes."""
    seen_tokens: int = 0
    """The longest row before this step."""


class KvLayer(CacheLayerMixin):
    """One layer's keys and values, in the form that transformers' attention layers write to."""

    is_sliding = False

    def __init__(self, step: _Step) -> None:
        CacheLayerMixin.__init__(self)
        self._step = step

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate zeros of the room that the step asks for, keeping what is there."""
        self.keys = _grown(self.keys, key_states, self._step)
        self.values = _grown(self.values, value_states, self._step)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the new keys and values [B, K, T, H]; return all that the step's queries may attend to."""
        step = self._step
        if self.keys is None or self.keys.shape[0] < step.room_rows or self.keys.shape[2] < step.room_tokens:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        if step.rows_B is None:
            num_tokens = key_states.shape[2]
            self.keys[step.row, :, :num_tokens] = key_states[0]
            self.values[step.row, :, :num_tokens] = value_states[0]
            return key_states, value_states
        self.keys[step.rows_B, :, step.positions_B] = key_states[:, :, 0]
        self.values[step.rows_B, :, step.positions_B] = value_states[:, :, 0]
        num_rows, longest = len(step.rows_B), step.seen_tokens + 1
        return self.keys[:num_rows, :, :longest], self.values[:num_rows, :, :longest]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys `update` will return, and the position of the first."""
        return self._step.seen_tokens + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens before the step's first query."""
        return self._step.seen_tokens

    def get_max_length(self) -> int:
        """No maximum of its own: the cache grows."""
        return -1


class KvCache:
    """Which rows are held and how long they are; the layers' tensors follow."""

    def __init__(self, num_layers: int, max_rows: int, max_tokens: int) -> None:
        """At most `max_rows` sequences of at most `max_tokens` tokens; memory is taken as they come."""
        self.max_rows = max_rows
        self.max_tokens = max_tokens
        self.lengths: list[int] = []
        """Tokens held by each row 0..n-1."""
        self._step = _Step()
        self._layers = [KvLayer(self._step) for _ in range(num_layers)]
        self.transformers_cache = Cache(layers=list(self._layers))
        """What to hand to the model as `past_key_values`."""

    @property
    def num_bytes(self) -> int:
        """Memory of all layers."""
        return sum(t.nbytes for layer in self._layers for t in (layer.keys, layer.values) if t is not None)

    def begin_prefill(self, num_tokens: int) -> int:
        """The next forward pass fills a new row with a prompt of `num_tokens`; returns the row."""
        row = len(self.lengths)
        assert row < self.max_rows, "the scheduler admits no more sequences than there are rows"
        self.lengths.append(num_tokens)
        self._make_room()
        step = self._step
        step.row, step.rows_B, step.positions_B, step.seen_tokens = row, None, None, 0
        return row

    def begin_decode(self, device: torch.device) -> Tensor:
        """The next forward pass adds one token to every row; returns their positions, int64 [B]."""
        step = self._step
        step.seen_tokens = max(self.lengths)
        step.rows_B = torch.arange(len(self.lengths), device=device)
        step.positions_B = torch.tensor(self.lengths, device=device)
        self.lengths = [length + 1 for length in self.lengths]
        self._make_room()
        return step.positions_B

    def free(self, row: int) -> None:
        """Give up `row`: the last row moves into its place, and what it leaves is zeroed."""
        last = len(self.lengths) - 1
        held = max(self.lengths[row], self.lengths[last])
        for layer in self._layers:
            for tensor in (layer.keys, layer.values):
                assert tensor is not None, "a row is held only after a forward pass"
                if row != last:
                    # Beyond the last row's own length this copies its zeros.
                    tensor[row, :, :held] = tensor[last, :, :held]
                tensor[last, :, :held] = 0
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def check_integrity(self) -> None:
        """Assert that every position that no sequence holds is zero, in every layer."""
        assert len(self.lengths) <= self.max_rows
        assert all(0 < length <= self.max_tokens for length in self.lengths)
        for layer in self._layers:
            for tensor in (layer.keys, layer.values):
                if tensor is None:
                    assert not self.lengths
                    continue
                assert not tensor[len(self.lengths) :].count_nonzero(), "a row that is free holds something"
                for row, length in enumerate(self.lengths):
                    assert not tensor[row, :, length:].count_nonzero(), "a row holds something beyond its length"

    def _make_room(self) -> None:
        """Double rows and tokens until what is held fits, up to the maxima."""
        step = self._step
        longest = max(self.lengths)
        assert longest <= self.max_tokens, "submit refuses what exceeds the context"
        step.room_rows, step.room_tokens = max(1, step.room_rows), max(_FIRST_TOKENS, step.room_tokens)
        while step.room_rows < len(self.lengths):
            step.room_rows *= 2
        while step.room_tokens < longest:
            step.room_tokens *= 2
        step.room_rows, step.room_tokens = min(step.room_rows, self.max_rows), min(step.room_tokens, self.max_tokens)


def _grown(old: Tensor | None, new_states_BKTH: Tensor, step: _Step) -> Tensor:
    _, num_heads, _, head_dim = new_states_BKTH.shape
    grown = new_states_BKTH.new_zeros(step.room_rows, num_heads, step.room_tokens, head_dim)
    if old is not None:
        grown[: old.shape[0], :, : old.shape[2]] = old
    return grown
