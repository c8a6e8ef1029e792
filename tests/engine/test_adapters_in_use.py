"""Adapters that come, go and fail under an engine at work: the answers stay those of the reference."""

import pytest

from cluster.engine.residency import PATIENCE_STEPS
from cluster.errors import InvalidMixture
from cluster.messages import FinishReason, Mixture
from tests.engine.systems import MIXTURES, PROMPTS, System, bytes_of, make_adapter, make_base, ref, reference, request

LAW, SQL = (Mixture.of({ref(name): 1.0}) for name in ("law", "sql"))


def test_a_failed_adapter_drops_those_that_wait_for_it_and_no_others():
    system = System(max_batch_size=1)
    system.submit(request("runs", mixture=LAW))
    system.deliver()
    system.step()
    for request_id, mixture in (("a", LAW), ("b", MIXTURES[5]), ("c", SQL), ("d", MIXTURES[0])):
        system.submit(request(request_id, mixture=mixture))
    assert system.engine.fail_adapter(ref("law")) == ["a", "b"]
    assert system.engine.fail_adapter(ref("law")) == []
    seen = system.run()
    assert {r for r, o in seen.items() if o.finish_reason is not None} == {"runs", "c", "d"}


def test_a_steady_stream_of_one_domain_does_not_keep_another_out():
    """Room for one adapter only, always a sequence of the hot domain running and waiting: the other gets its turn."""
    system = System(max_batch_size=2, adapter_bytes=bytes_of("zephyra", LAW))
    for name in ("law", "sql"):  # both sizes are known, and law is resident last
        system.engine.add_adapter(ref(name), system.adapters[ref(name)])
    system.engine.add_adapter(ref("law"), system.adapters[ref("law")])
    system.submit(request("hot0", PROMPTS[0], LAW, max_tokens=3))
    system.step()
    system.submit(request("cold", PROMPTS[0], SQL, max_tokens=3))
    expected = reference("zephyra", PROMPTS[0], SQL, 3)
    for index in range(1, PATIENCE_STEPS + 20):
        system.submit(request(f"hot{index}", PROMPTS[0], LAW, max_tokens=3))
        system.deliver()
        if system.engine.has_work:
            system.step()
        if system.observed["cold"].finish_reason is not None:
            break
    assert system.observed["cold"].token_ids == expected.token_ids


@pytest.mark.parametrize("arrivals", [("math", "poetry", "law", "sql"), ("law", "math", "poetry", "sql")])
def test_two_mixtures_that_fit_only_one_at_a_time_both_run(arrivals):
    first, second = Mixture.of({ref("law"): 1.0, ref("sql"): 1.0}), Mixture.of({ref("math"): 1.0, ref("poetry"): 1.0})
    system = System(adapter_bytes=max(bytes_of("zephyra", first), bytes_of("zephyra", second)))
    system.submit(request("first", mixture=first))
    system.submit(request("second", mixture=second))
    # Adversarial orders: the later one's adapters arrive first and have to go again, or in between and must not stay.
    for name in arrivals:
        system.engine.add_adapter(ref(name), system.adapters[ref(name)])
        system.engine.check_integrity()
    seen = system.run()
    assert {o.finish_reason for o in seen.values()} <= {FinishReason.LENGTH, FinishReason.STOP}


def test_a_mixture_beyond_the_budget_is_given_up_with_the_reason_and_refused_next_time():
    system = System(adapter_bytes=bytes_of("zephyra", LAW) + 1)
    both = Mixture.of({ref("law"): 0.5, ref("sql"): 0.5})
    system.submit(request("both", mixture=both))
    system.submit(request("law", mixture=LAW))
    system.deliver()
    outputs = {output.request_id: output for output in system.step()}
    assert isinstance(outputs["both"].error, InvalidMixture)
    assert outputs["both"].chunk.finish_reason is FinishReason.ERROR
    assert "2 adapters" in str(outputs["both"].error)
    with pytest.raises(InvalidMixture, match="mix fewer, or raise adapter_bytes"):
        system.submit(request("again", mixture=both))
    assert system.run()["law"].finish_reason is not None


def test_an_evicted_adapter_comes_back_with_the_same_answer():
    system = System(max_batch_size=2, adapter_bytes=bytes_of("zephyra", LAW))
    for name in ("law", "math", "law"):
        mixture = Mixture.of({ref(name): 1.0})
        system.submit(request(name, mixture=mixture))
        seen = system.run()[name]
        assert seen.token_ids == reference("zephyra", PROMPTS[1], mixture, 8).token_ids
    assert system.engine.stats().num_evictions == 2


def test_many_adapters_in_one_mixture():
    """64 at once, their deltas cancelling in pairs: the answer is the base's."""
    system, model = System(), make_base().model
    weights = {}
    for index in range(64):
        name = ref(f"d{index}")
        scale = 0.5 if index % 2 else -0.5
        system.adapters[name] = make_adapter(model, 100 + index // 2, rank=2, scale=scale)
        weights[name] = 1.0
    system.submit(request("many", mixture=Mixture.of(weights)))
    assert len(system.engine.wanted_adapters()) == 64
    assert system.run()["many"].token_ids == reference("zephyra", PROMPTS[1], Mixture(), 8).token_ids
