"""Examples of a domain: what is written is what is read, and what cannot be meant is refused."""

import json

import pytest

from cluster.errors import InvalidData
from cluster.router.domain_prototypes import prototypes_from_examples
from cluster.router.examples import Examples
from cluster.router.tiny_ada import TinyAda
from tests.router.test_tiny_ada import TAX

STRANGE = ("a\u2028b", "tab\there", '"quoted"', "line\nbreak", "\U0001f600 ünïcode")


def test_examples_survive_with_and_without_topics() -> None:
    assert Examples.from_bytes(Examples(STRANGE).to_bytes()) == Examples(STRANGE)
    told = Examples(STRANGE, ("one", "two", "one", "", "ü"))
    assert Examples.from_bytes(told.to_bytes()) == told


def test_what_a_user_may_write() -> None:
    assert Examples.from_bytes(b'"one"\n\n{"prompt": "two", "more": 1}\n').prompts == ("one", "two")
    assert Examples.from_bytes(b"erste Frage\n\n zweite \r\n", is_json=False).prompts == ("erste Frage", " zweite ")


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\n", b"{", b"7", b"[]", b'{"text": "x"}', b'{"prompt": 3}', b'{"prompt": " "}', b"\xff"),
        *(b'{"prompt": "x", "topic": 3}', b'{"prompt": "x", "topic": "a"}\n"y"\n'),
    ],
)
def test_what_cannot_be_meant_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidData):
        Examples.from_bytes(content)


def test_there_are_limits() -> None:
    with pytest.raises(InvalidData, match="10001 examples"):
        Examples.from_bytes(b'"x"\n' * 10_001)
    with pytest.raises(InvalidData, match="100001 characters"):
        Examples.from_bytes(json.dumps("x" * 100_001).encode())


def test_each_topic_has_a_prototype_of_its_own(ada: TinyAda) -> None:
    topics = tuple(str(number % 3) for number in range(len(TAX)))
    told = prototypes_from_examples(ada, 1, "tax", Examples(tuple(TAX), topics))
    assert len(told.rows_PV) == len(set(topics))
    index = (grown := ada.with_domain("tax", TAX, topics)).domains.index("tax")
    assert told.rows_PV.tolist() == grown.head.prototypes_DPV[index, : len(told.rows_PV)].tolist()
