"""The table of statuses: complete, and what clients see of it."""

import inspect
import pickle

import pytest

from cluster import errors
from cluster.errors import PromptTooLong, UnknownDomain, UnknownModel, ZephyraError
from deployments.api.status import NEVER_SENT, STATUS, code_of, message_of, status_of

CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, ZephyraError)]


def test_every_error_has_a_status_or_is_never_sent():
    assert set(STATUS) | NEVER_SENT == set(CLASSES)
    assert not set(STATUS) & NEVER_SENT


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_keeps_its_status_and_message_between_processes(cls):
    error = cls("'x' is not y; give y.")
    copy = pickle.loads(pickle.dumps(error))
    assert status_of(copy) == status_of(error)
    assert message_of(copy) == "'x' is not y; give y."


@pytest.mark.parametrize("cls", CLASSES)
def test_http_and_grpc_agree_on_whose_fault_it_is(cls):
    status = status_of(cls("x"))
    servers_fault = {"INTERNAL", "DATA_LOSS", "UNAVAILABLE", "DEADLINE_EXCEEDED"}
    assert (status.http >= 500) == (status.grpc.name in servers_fault)
    assert (status.http >= 500) == (status.openai_type == "server_error")


def test_codes_are_openais_where_it_has_one():
    assert code_of(UnknownModel("")) == "model_not_found"
    assert code_of(PromptTooLong("")) == "context_length_exceeded"
    assert code_of(UnknownDomain("")) == "unknown_domain"


def test_a_message_fits_a_header_however_long_the_value_it_quotes():
    assert len(message_of(UnknownModel("x" * 10**6))) == 1000
