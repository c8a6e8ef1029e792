"""The bytes of tokens: joined, they are what the tokenizer itself decodes, for both ways of writing bytes as tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cluster.engine.sampler import Sampled
from cluster.engine.vocabulary import Vocabulary
from tests.engine.systems import tokenizer

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.text("ab 😀ü7\u2581<0x", max_size=20)


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: a mark for spaces, and a token for each byte that is in no piece."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    # No merges: every character is a piece of its own, or the tokens of its bytes.
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581abtheqickrown7"]
    ids = {piece: token_id for token_id, piece in enumerate(dict.fromkeys(pieces))}
    made.model = models.BPE(ids, [], byte_fallback=True, unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>")


def word_piece_tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1, "world": 2}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


KINDS = {"bytes as signs": tokenizer(), "bytes as tokens": byte_fallback_tokenizer()}


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=80)
@given(text=TEXTS)
def test_joined_bytes_are_the_text_that_was_encoded(kind, text):
    tokens = KINDS[kind]
    vocabulary = Vocabulary(tokens)
    ids = tokens.encode(text, add_special_tokens=False)
    # The space mark itself comes back as a space.
    expected = text.replace("\u2581", " ") if kind == "bytes as tokens" else text
    assert b"".join(vocabulary.text_bytes(token) or b"" for token in ids).decode() == expected
    assert tokens.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == expected


def test_half_characters_are_shown_as_bytes_and_special_tokens_by_name():
    vocabulary, tokens = Vocabulary(tokenizer()), tokenizer()
    first, *_ = tokens.encode("é", add_special_tokens=False)
    end = tokens.eos_token_id
    report = vocabulary.token_logprob(Sampled(first, -1.5, ((end, -0.5), (first, -1.5), (10**6, -9.0))))
    assert (report.token_id, report.logprob, report.text, report.text_bytes) == (first, -1.5, "\\xc3", b"\xc3")
    assert [(top.text, top.text_bytes) for top in report.top] == [
        ("<|eos|>", None),
        ("\\xc3", b"\xc3"),
        ("<|1000000|>", None),
    ]


def test_added_tokens_that_are_not_special_are_text():
    tokens = word_piece_tokenizer()
    tokens.add_tokens([AddedToken("<think>", special=False)])
    vocabulary = Vocabulary(tokens)
    assert vocabulary.text_bytes(tokens.convert_tokens_to_ids("<think>")) == b"<think>"
    assert [vocabulary.text_bytes(token) for token in (0, 1, 2)] == [None, b"hello", b"world"]
