"""The detokenizer against the decoding of all ids at once, for any text in any pieces."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.engine.detokenizer import Detokenizer
from tests.engine.systems import tokenizer

_text = st.text(st.characters(exclude_categories=("Cs",)), max_size=40) | st.text(
    "ab e😀\u0301👩\u200d👧é\ufffd字", max_size=40
)
_cuts = st.lists(st.integers(1, 4), min_size=1, max_size=60)


def encode(text: str) -> list[int]:
    """Ids of `text` as text, even where it spells a special token."""
    return list(tokenizer()(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def decode(ids: list[int]) -> str:
    return tokenizer().decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces(ids: list[int], sizes: list[int]) -> list[list[int]]:
    """`ids` cut into pieces of these sizes, over and over."""
    cut, start, index = [], 0, 0
    while start < len(ids):
        cut.append(ids[start : start + sizes[index % len(sizes)]])
        start += len(cut[-1])
        index += 1
    return cut


def texts_of(ids: list[int], sizes: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    detokenizer = Detokenizer(tokenizer(), stop)
    texts = [detokenizer.push(piece) for piece in pieces(ids, sizes)]
    return [*texts, detokenizer.finish()], detokenizer.stopped


def cut_at_stop(text: str, stop: tuple[str, ...]) -> str:
    """Reference: read one character more until a stop string is there; cut before the longest that is."""
    for end in range(len(text) + 1):
        found = [len(s) for s in stop if text[:end].endswith(s)]
        if found:
            return text[: end - max(found)]
    return text


@settings(deadline=None, max_examples=200)
@given(text=_text, sizes=_cuts)
def test_pieces_join_to_the_text(text, sizes):
    ids = encode(text)
    texts, _ = texts_of(ids, sizes)
    assert "".join(texts) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in texts), "half a character got out"


@settings(deadline=None, max_examples=200)
@given(ids=st.lists(st.integers(0, 339), max_size=40), sizes=_cuts)
def test_any_ids_join_to_their_decoding(ids, sizes):
    """Bytes that are no text, and special tokens, included."""
    ids = [token for token in ids if token < len(tokenizer())]
    assert "".join(texts_of(ids, sizes)[0]) == decode(ids)


@settings(deadline=None, max_examples=300)
@given(
    text=st.text("ab😀é", max_size=30),
    stop=st.lists(st.text("ab😀é", min_size=1, max_size=4), min_size=1, max_size=3).map(tuple),
    sizes=_cuts,
)
def test_text_ends_before_the_first_stop_string_to_be_completed(text, stop, sizes):
    ids = encode(text)
    texts, stopped = texts_of(ids, sizes, stop)
    assert "".join(texts) == cut_at_stop(text, stop)
    assert stopped == any(s in text for s in stop)


@pytest.mark.parametrize(
    ("stop", "text", "certain"),
    [
        ("other", "stop", "stop"),
        ("stop!", "sto", ""),
        ("stop!", "x st", "x "),
        ("stop!", "ss", "s"),
        ("aab", "aaa", "a"),
    ],
)
def test_what_may_begin_a_stop_string_is_held_and_the_rest_is_not(stop, text, certain):
    """`certain` is all but the longest end of the text that begins the stop string."""
    detokenizer = Detokenizer(tokenizer(), (stop,))
    given_out = "".join(detokenizer.push([token]) for token in encode(text))
    assert given_out == certain
    assert given_out + detokenizer.finish() == text


def test_a_character_of_several_tokens_comes_out_whole_with_its_last():
    ids = encode("🪿")
    assert len(ids) > 1
    detokenizer = Detokenizer(tokenizer())
    assert [detokenizer.push([token]) for token in ids] == [""] * (len(ids) - 1) + ["🪿"]


def test_special_tokens_are_no_text():
    ids = tokenizer()("hello")["input_ids"]
    assert len(ids) > len(encode("hello"))
    assert "".join(texts_of(ids, [1])[0]) == "hello"
