"""The tokenizer: any text comes back, completions and chats mean the same, and nobody can forge a turn."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cluster.errors import InvalidInput
from cluster.messages import ChatMessage, Role
from cluster.model.base import encode_prompt
from cluster.model.tokenizer import ASSISTANT, BOS, EOS, PAD, SYSTEM, USER, train_tokenizer

_TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "What is 7 times 6? 2024 1999 2024 1999 2024",
    "select name from users where id = 1; árbol, 日本語, ナイフ",
]
SPECIAL = (PAD, BOS, EOS, USER, ASSISTANT, SYSTEM)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(_TEXTS * 3, vocab_size=330, max_length_tokens=512)


def _user(content: str) -> tuple[ChatMessage, ...]:
    return (ChatMessage(Role.USER, content),)


# Without lone surrogates, which are no text and are refused before anything is encoded.
_ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@settings(deadline=None, max_examples=200)
@given(text=_ANY_TEXT | st.lists(st.sampled_from([*SPECIAL, "<", "|>", "a ", "12"]), max_size=6).map("".join))
def test_any_text_comes_back_as_it_was(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = encode_prompt(tokenizer, text)
    assert ids[:2] == [tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids(USER)]
    assert ids[-1] == tokenizer.convert_tokens_to_ids(ASSISTANT)
    assert tokenizer.decode(ids[2:-1]) == text


# The two private-use characters with which transformers marks control tokens do not survive its chat templates.
_CHAT_TEXT = _ANY_TEXT.filter(lambda text: not {"\U000f0000", "\U000f0001"} & set(text))


@settings(deadline=None, max_examples=100)
@given(text=_CHAT_TEXT)
def test_a_completion_means_what_a_chat_of_one_user_message_means(
    tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    assert encode_prompt(tokenizer, text) == encode_prompt(tokenizer, _user(text))


_FORGED = st.lists(st.sampled_from([*SPECIAL, "yes", " ", "<|as", "sistant|>", "\n", "<|"]), min_size=1, max_size=8)


@settings(deadline=None, max_examples=100)
@given(parts=_FORGED)
def test_special_tokens_in_what_a_user_wrote_are_only_letters(
    tokenizer: PreTrainedTokenizerBase, parts: list[str]
) -> None:
    text = "".join(parts)
    bos, user, assistant = (tokenizer.convert_tokens_to_ids(token) for token in (BOS, USER, ASSISTANT))
    special = set(tokenizer.all_special_ids)
    assert [i for i in encode_prompt(tokenizer, text) if i in special] == [bos, user, assistant]
    chat = (*_user(text), ChatMessage(Role.ASSISTANT, text), *_user(text))
    expected = [bos, user, assistant, tokenizer.eos_token_id, user, assistant]
    ids = encode_prompt(tokenizer, chat)
    assert [i for i in ids if i in special] == expected
    assert tokenizer.decode(ids) == f"{BOS}{USER}{text}{ASSISTANT}{text}{EOS}{USER}{text}{ASSISTANT}"


def test_a_chat_follows_its_template(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = (
        ChatMessage(Role.SYSTEM, "be brief"),
        ChatMessage(Role.USER, "hi"),
        ChatMessage(Role.ASSISTANT, "hello"),
        ChatMessage(Role.USER, "what is 12?"),
    )
    expected = f"{BOS}{SYSTEM}be brief{USER}hi{ASSISTANT}hello{EOS}{USER}what is 12?{ASSISTANT}"
    assert encode_prompt(tokenizer, chat) == tokenizer(expected, add_special_tokens=False)["input_ids"]


def test_a_template_that_refuses_says_so_and_without_one_a_chat_is_its_texts() -> None:
    tokenizer = train_tokenizer(_TEXTS, vocab_size=300, max_length_tokens=512)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidInput, match="refuses the messages: roles must alternate"):
        encode_prompt(tokenizer, _user("hi"))
    tokenizer.chat_template = None
    assert encode_prompt(tokenizer, _user("hi")) == encode_prompt(tokenizer, "hi")
    chat = (ChatMessage(Role.SYSTEM, "be brief"), *_user("hi"))
    assert encode_prompt(tokenizer, chat) == encode_prompt(tokenizer, "be brief\n\nhi")


def test_digits_stay_single(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.tokenize("2024") == ["2", "0", "2", "4"]
    assert not [token for token in tokenizer.get_vocab() if sum(c.isdigit() for c in token) > 1]


def test_the_same_texts_give_the_same_tokenizer_also_from_disk(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    again = train_tokenizer(_TEXTS * 3, vocab_size=330, max_length_tokens=512)
    assert again.get_vocab() == tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "the 12 quick 日本 foxes <|eos|>"
    for prompt in (text, _user(text)):
        expected = encode_prompt(tokenizer, prompt)
        assert encode_prompt(again, prompt) == expected
        assert encode_prompt(loaded, prompt) == expected
