"""Text to features: any string, bounded, the same for what reads the same, and batches that keep texts apart."""

import time
import zlib

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.router.features import (
    CHARACTERS,
    HEAD_CHARACTERS,
    NUM_SLOTS,
    PAIR,
    TAIL_CHARACTERS,
    TOKEN,
    WORD,
    collate,
    extract,
    normalise,
    packed,
)

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=80)


@given(ANY_TEXT)
@settings(deadline=None, max_examples=100)
def test_any_string_has_features_in_range(text: str) -> None:
    features = extract(text)
    assert len(features.slots_N) == len(features.kinds_N) == len(features.words_N) >= 1
    assert features.slots_N.min() >= 0
    assert features.slots_N.max() < NUM_SLOTS
    assert features.words_N.max() < features.num_words


def test_counts_of_a_known_sentence() -> None:
    """`<to>` has runs of 3: <to, to>; of 4: <to>. `<be>` alike. Three pairs: edge-to, to-be, be-edge."""
    features = extract("to be")
    kinds = np.bincount(features.kinds_N, minlength=3)
    assert (kinds[WORD], kinds[PAIR], kinds[CHARACTERS]) == (2, 3, 6)


@given(ANY_TEXT)
@settings(deadline=None, max_examples=100)
def test_a_native_call_is_given_the_same_features(text: str) -> None:
    features, (slots, kinds, count) = extract(text), packed(text)
    assert np.frombuffer(slots, dtype=np.int64).tolist() == features.slots_N.tolist()
    assert np.frombuffer(kinds, dtype=np.int64).tolist() == features.kinds_N.tolist()
    assert count == len(features.slots_N)


@given(ANY_TEXT)
@settings(deadline=None, max_examples=100)
def test_pairs_are_hashed_as_by_unsigned_arithmetic_of_32_bits(text: str) -> None:
    """What published routers were trained with: another hash would make them blind."""
    edge = zlib.crc32(b"the edge of the text")
    words = [zlib.crc32(b"w" + word.encode("utf-8", "surrogatepass")) for word in TOKEN.findall(normalise(text))]
    hashes, factor = np.array([edge, *words, edge], dtype=np.uint32), np.uint32(0x9E3779B1)
    expected = ((((hashes[:-1] * factor) ^ hashes[1:]) * factor) >> np.uint32(11)).astype(np.int64) % NUM_SLOTS
    features = extract(text)
    assert features.slots_N[features.kinds_N == PAIR].tolist() == expected.tolist()


def test_pairs_know_the_order_and_words_do_not() -> None:
    one, other = extract("dog bites man"), extract("man bites dog")

    def slots(features: object, kind: int) -> set[int]:
        return set(features.slots_N[features.kinds_N == kind].tolist())  # type: ignore[attr-defined]

    assert slots(one, WORD) == slots(other, WORD)
    assert slots(one, PAIR).isdisjoint(slots(other, PAIR))


def test_case_width_and_digits_do_not_matter() -> None:
    reference = extract("convert 42 km")
    for variant in ("CONVERT 42 KM", "convert 97 km", "ｃｏｎｖｅｒｔ ４２ ｋｍ", "convert   42\nkm"):
        assert np.array_equal(extract(variant).slots_N, reference.slots_N), variant


def test_a_megabyte_is_read_at_its_ends_in_bounded_time() -> None:
    long = "start " + "x" * 1_000_000 + " end"
    began = time.perf_counter()
    features = extract(long)
    assert time.perf_counter() - began < 0.5
    assert set(extract("start").slots_N[:1]) <= set(features.slots_N.tolist())
    assert set(extract("end").slots_N[:1]) <= set(features.slots_N.tolist())
    # U+FDFA becomes eighteen characters each.
    assert len(normalise("\ufdfa" * 1_000_000)) <= 2 * (HEAD_CHARACTERS + TAIL_CHARACTERS)


@given(st.lists(ANY_TEXT, max_size=6))
@settings(deadline=None, max_examples=50)
def test_a_batch_is_its_texts_one_after_another(texts: list[str]) -> None:
    parts = [extract(text) for text in texts]
    batch = collate(parts)
    first_word = 0
    for index, part in enumerate(parts):
        own = batch.texts_N == index
        assert batch.slots_N[own].tolist() == part.slots_N.tolist()
        assert batch.kinds_N[own].tolist() == part.kinds_N.tolist()
        assert batch.words_N[own].tolist() == (part.words_N + first_word).tolist()
        first_word += part.num_words
    assert (batch.num_texts, batch.num_words) == (len(texts), first_word)
