"""Labels: which may be asked about, and shares that are torch's softmax."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.classification import (
    MAX_LABEL_CHARACTERS,
    MAX_LABELS,
    ClassifyRequest,
    Normalize,
    label_scores,
    likeliest,
)
from cluster.errors import InvalidInput
from cluster.messages import AnswerScore, ClientRequest

ASKED = ClientRequest("hi")
_scores = st.lists(
    st.builds(AnswerScore, st.floats(-1e30, 0) | st.floats(-50, 0), st.integers(1, 300)),
    min_size=1,
    max_size=MAX_LABELS,
)


@given(scores=_scores, normalize=st.sampled_from(Normalize))
def test_shares_are_a_softmax_and_order_as_what_is_compared(scores, normalize):
    labels = [str(index) for index in range(len(scores))]
    found = label_scores(labels, scores, normalize)
    assert [(one.label, one.logprob, one.num_tokens) for one in found] == [
        (label, score.logprob, score.num_tokens) for label, score in zip(labels, scores, strict=True)
    ]
    compared = [s.logprob / s.num_tokens if normalize is Normalize.LENGTH else s.logprob for s in scores]
    expected = torch.tensor(compared, dtype=torch.float64).softmax(dim=0).tolist()
    assert [one.probability for one in found] == pytest.approx(expected, abs=1e-12)
    assert math.fsum(one.probability for one in found) == pytest.approx(1.0, abs=1e-12)
    ascending = sorted(range(len(scores)), key=compared.__getitem__)
    shares = [found[index].probability for index in ascending]
    assert shares == sorted(shares)
    assert compared[int(likeliest(found).label)] == pytest.approx(max(compared), abs=1e-12)
    backwards = label_scores(labels[::-1], scores[::-1], normalize)[::-1]
    assert [one.probability for one in backwards] == pytest.approx([one.probability for one in found], rel=1e-12)


def test_lengths_matter_only_where_asked_and_of_a_tie_the_first_is_taken():
    scores = [AnswerScore(-3.0, 3), AnswerScore(-2.0, 1), AnswerScore(-2.0, 1)]
    assert likeliest(label_scores("abc", scores)).label == "b"
    assert likeliest(label_scores("abc", scores, Normalize.LENGTH)).label == "a"
    (alone,) = label_scores("a", scores[:1])
    assert alone.probability == 1.0


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ((), "There are 0 labels; expected 1 to 64"),
        (tuple(map(str, range(MAX_LABELS + 1))), "There are 65 labels"),
        (("a", ""), "empty"),
        (("a", "b", "a"), "'a' is given twice"),
        (("x" * (MAX_LABEL_CHARACTERS + 1),), "257 characters"),
        (("a\ud800",), "UTF-8"),
    ],
)
def test_labels_that_cannot_be(labels, said):
    with pytest.raises(InvalidInput, match=said):
        ClassifyRequest(ASKED, labels)


def test_labels_that_just_can_be():
    labels = (*map(str, range(MAX_LABELS - 1)), "😀" * MAX_LABEL_CHARACTERS)
    assert ClassifyRequest(ASKED, labels).labels == labels
