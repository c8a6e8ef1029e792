"""The nouns: what they accept, that equal ones are equal, and that they cross a process border as they are."""

import math
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import InvalidInput, InvalidMixture
from cluster.messages import (
    MAX_MIXTURE_ENTRIES,
    MAX_PROMPT_CHARACTERS,
    MAX_ROUTED_TURNS,
    RESERVED_NAMES,
    AdapterRef,
    ChatMessage,
    ClientRequest,
    GenerateRequest,
    Mixture,
    Role,
    SamplingParams,
    check_domain_name,
    check_prompt,
    check_vocabulary,
    check_weights,
    turns_to_route,
)

_NAMES = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,62}", fullmatch=True).filter(lambda name: name not in RESERVED_NAMES)
_REFS = st.builds(AdapterRef, _NAMES, st.integers(0, 10**18 - 1))
_WEIGHTS = st.floats(min_value=1e-6, max_value=1e6)


@settings(deadline=None)
@given(ref=_REFS)
def test_a_ref_is_read_back_as_it_was_written(ref: AdapterRef) -> None:
    assert AdapterRef.parse(str(ref)) == ref


@settings(deadline=None, max_examples=300)
@given(text=st.text("law@0123٣ -+.", max_size=8) | st.text(max_size=12))
def test_what_is_read_as_a_ref_is_how_that_ref_is_written(text: str) -> None:
    try:
        ref = AdapterRef.parse(text)
    except InvalidInput:
        return
    assert str(ref) == text


@pytest.mark.parametrize(
    "text", ["", "law", "@1", "law@", "law@1@2", "law@-1", "law@01", "law@1.0", "law@٣", "law@1\n"]
)
def test_what_is_no_ref_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        AdapterRef.parse(text)


@pytest.mark.parametrize(
    "name", ["", "Law", "a b", "../x", "a/b", "-a", "_a", "a" * 64, "law\n", "é", *sorted(RESERVED_NAMES)]
)
def test_what_cannot_name_a_domain_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match="cannot name a domain: use up to 63 of a-z"):
        check_domain_name(name)


@settings(deadline=None)
@given(weights=st.dictionaries(_REFS, _WEIGHTS, min_size=1, max_size=6), data=st.data())
def test_equal_mixtures_are_equal_whatever_order_they_were_asked_in(
    weights: dict[AdapterRef, float], data: st.DataObject
) -> None:
    mixture = Mixture.of(weights)
    shuffled = Mixture.of(dict(data.draw(st.permutations(list(weights.items())))))
    unused = AdapterRef("not-among-them", 1)
    assert mixture == shuffled == Mixture.of({**weights, unused: 0.0})
    assert hash(mixture) == hash(shuffled)
    assert mixture.key == shuffled.key
    assert dict(mixture.entries) == weights
    changed = data.draw(st.sampled_from(list(weights)))
    assert Mixture.of({**weights, changed: weights[changed] * 2}).key != mixture.key


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1.0, -1e-300])
def test_weights_that_cannot_be_are_refused_by_name(bad: float) -> None:
    with pytest.raises(InvalidMixture, match=f"weight of law is {bad}"):
        check_weights({"math": 1.0, "law": bad})


def test_all_zero_and_too_many_weights_are_refused() -> None:
    with pytest.raises(InvalidMixture, match=r"All weights are zero \(law, math\)"):
        check_weights({"law": 0.0, "math": 0.0})
    check_weights({f"d{i}": 1.0 for i in range(MAX_MIXTURE_ENTRIES)})
    with pytest.raises(InvalidMixture, match="1025 entries; the most is 1024"):
        check_weights({f"d{i}": 1.0 for i in range(MAX_MIXTURE_ENTRIES + 1)})


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("max_tokens", (1, 10**6), (0, -1)),
        ("temperature", (0.0, 10.0), (-0.1, 10.1, math.nan, math.inf)),
        ("top_p", (1e-9, 1.0), (0.0, 1.1, -1.0, math.nan)),
        ("top_k", (0, 5), (-1,)),
        ("seed", (None, 0, 2**63 - 1), (-1, 2**63)),
        ("stop", ((), ("a",) * 16), (("",), ("a",) * 17)),
        ("min_p", (0.0, 1.0), (-0.1, 1.1, math.nan)),
        ("repetition_penalty", (0.01, 1.0, 100.0), (0.0, -1.0, 101.0, math.nan, math.inf)),
        ("presence_penalty", (-2.0, 2.0), (-2.1, 2.1, math.nan)),
        ("frequency_penalty", (-2.0, 2.0), (-2.1, 2.1, math.nan)),
        (
            "logit_bias",
            ((), ((0, -100.0), (1, 100.0)), tuple((i, 1.0) for i in range(300))),
            (((0, 100.1),), ((0, math.nan),), ((0, 1.0), (0, 2.0)), tuple((i, 1.0) for i in range(301))),
        ),
        ("stop_token_ids", ((), tuple(range(64))), (tuple(range(65)),)),
        ("logprobs", (None, 0, 20), (-1, 21)),
    ],
)
def test_sampling_takes_what_it_says_and_nothing_else(field: str, good: tuple[object], bad: tuple[object]) -> None:
    for value in good:
        assert getattr(SamplingParams(**{field: value}), field) == value
    for value in bad:
        with pytest.raises(InvalidInput, match=f"^{field} is "):
            SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("field", "name", "good", "bad"),
    [
        ("num_choices", "n", (1, 16), (0, -1, 17)),
        ("priority", "priority", (0, -(2**31), 2**31 - 1), (2**31, -(2**31) - 1)),
        ("timeout_s", "timeout_s", (None, 1e-3, 86_400.0), (0.0, -1.0, 86_401.0, math.nan, math.inf)),
    ],
)
def test_a_client_request_takes_what_it_says_and_nothing_else(
    field: str, name: str, good: tuple[object], bad: tuple[object]
) -> None:
    for value in good:
        assert getattr(ClientRequest("hi", **{field: value}), field) == value
    for value in bad:
        with pytest.raises(InvalidInput, match=f"^{name} is "):
            ClientRequest("hi", **{field: value})


def test_tokens_beyond_the_vocabulary_are_refused_by_name() -> None:
    check_vocabulary(SamplingParams(logit_bias=((0, 1.0), (9, 1.0)), stop_token_ids=(0, 9)), 10)
    for bad in (10, -1):
        with pytest.raises(InvalidInput, match=f"^logit_bias names token {bad}; the model's tokens are 0 to 9"):
            check_vocabulary(SamplingParams(logit_bias=((1, 1.0), (bad, 1.0))), 10)
        with pytest.raises(InvalidInput, match=f"^stop_token_ids names token {bad};"):
            check_vocabulary(SamplingParams(stop_token_ids=(1, bad)), 10)


def test_prompts_that_cannot_be_are_refused() -> None:
    def user(text: str) -> ChatMessage:
        return ChatMessage(Role.USER, text)

    for good in ("a", (ChatMessage(Role.SYSTEM, ""), user("hi")), "a" * MAX_PROMPT_CHARACTERS):
        check_prompt(good)
    for empty in ("", " \n", (), (user(" "),)):
        with pytest.raises(InvalidInput, match="prompt is empty"):
            check_prompt(empty)
    with pytest.raises(InvalidInput, match=r"1000001 characters; the most is 1000000"):
        check_prompt((user("a"), user("a" * MAX_PROMPT_CHARACTERS)))
    with pytest.raises(InvalidInput, match="last message is the assistant's; expected the user's"):
        check_prompt((user("hi"), ChatMessage(Role.ASSISTANT, "hello")))
    with pytest.raises(InvalidInput, match="not valid UTF-8 at character 2"):
        check_prompt("ab\ud800")


def test_the_router_reads_the_users_last_turns() -> None:
    assert turns_to_route("whole") == ("whole",)
    chat = [ChatMessage(Role.SYSTEM, "rules")]
    for number in range(MAX_ROUTED_TURNS + 2):
        chat += [ChatMessage(Role.ASSISTANT, "hello"), ChatMessage(Role.USER, str(number))]
        expected = tuple(str(n) for n in range(number + 1))[-MAX_ROUTED_TURNS:]
        assert turns_to_route(tuple(chat)) == expected


def test_a_request_crosses_a_process_border_as_it_is() -> None:
    request = GenerateRequest(
        "r1",
        (ChatMessage(Role.USER, "hé"),),
        Mixture.of({AdapterRef("law", 1): 0.5, AdapterRef("math", 2): 0.25}),
        SamplingParams(seed=7, stop=("x",), logit_bias=((1, 2.0),), logprobs=3),
        priority=-1,
        timeout_s=2.5,
    )
    assert pickle.loads(pickle.dumps(request)) == request
