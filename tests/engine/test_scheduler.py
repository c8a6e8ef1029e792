"""Who is admitted, seen through the engine: first come, first served; a missing adapter holds up nobody else."""

import pytest
import torch

from cluster.errors import InvalidInput, InvalidMixture, Overloaded
from cluster.messages import FinishReason, Mixture
from tests.engine.systems import MIXTURES, PROMPTS, System, bytes_of, make_adapter, make_base, ref, reference, request

LAW, SQL, MATH = (Mixture.of({ref(name): 1.0}) for name in ("law", "sql", "math"))


def running(system: System) -> set[str]:
    """The requests whose logits the last step computed: their count of logits grew."""
    before = {request_id: len(steps) for request_id, steps in system.runner.logits.items()}
    system.step()
    return {r for r, steps in system.runner.logits.items() if len(steps) > before.get(r, 0)}


def test_first_come_first_served():
    system = System(max_batch_size=2)
    for index in range(4):
        system.submit(request(f"r{index}", PROMPTS[0], max_tokens=3 + index))
    assert running(system) == {"r0", "r1"}
    system.step()
    system.step()
    assert running(system) == {"r1", "r2"}


def test_a_sequence_waiting_for_an_adapter_holds_up_nobody():
    system = System(max_batch_size=2)
    system.submit(request("law", mixture=LAW))
    assert not system.engine.has_work
    system.submit(request("base"))
    assert system.engine.has_work
    assert running(system) == {"base"}
    assert system.engine.wanted_adapters() == (ref("law"),)
    system.deliver()
    assert running(system) == {"base", "law"}


def test_wanted_adapters_come_in_queue_order_without_repeats():
    system = System()
    for index, mixture in enumerate((MATH, MIXTURES[0], LAW, MIXTURES[6], MATH)):
        system.submit(request(f"r{index}", mixture=mixture))
    assert system.engine.wanted_adapters() == (ref("math"), ref("law"), ref("sql"))
    system.deliver()
    assert system.engine.wanted_adapters() == ()


def test_a_mixture_needs_all_its_adapters_at_once():
    system = System()
    system.submit(request("r", mixture=MIXTURES[6]))
    for name in ("law", "sql"):
        system.engine.add_adapter(ref(name), system.adapters[ref(name)])
        assert not system.engine.has_work
    system.deliver()
    assert system.engine.has_work


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


def test_a_full_queue_refuses():
    system = System(max_batch_size=1, max_waiting=2)
    for index in range(2):
        system.submit(request(f"r{index}"))
    with pytest.raises(Overloaded, match="2 requests are waiting"):
        system.submit(request("r2"))
    system.step()
    system.submit(request("r2"))
    system.engine.cancel("r1")
    for taken in ("r0", "r2"):  # one runs, one waits
        with pytest.raises(InvalidInput, match=f"'{taken}' is in use"):
            system.submit(request(taken))


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
    for index in range(1, 400):
        system.submit(request(f"hot{index}", PROMPTS[0], LAW, max_tokens=3))
        system.deliver()
        if system.engine.has_work:
            system.step()
        if system.observed["cold"].finish_reason is not None:
            break
    assert system.observed["cold"].token_ids == expected.token_ids
    assert index > 64, "the stream was held up before the bound on overtaking"


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
    assert running(system) == {"first"}
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


def test_an_evicted_adapter_leaves_no_copy_behind():
    system = System(adapter_bytes=bytes_of("zephyra", LAW))
    system.submit(request("r", mixture=LAW))
    system.run()
    x_TI = torch.ones(1, 48)
    assert system.runner.mixed_batch.delta("model.layers.0.self_attn.q_proj", x_TI) is not None
    assert system.engine.stats().stacked_adapter_bytes == bytes_of("zephyra", LAW)
    system.engine.add_adapter(ref("math"), system.adapters[ref("math")])
    assert system.engine.stats().resident_adapters == (ref("math"),)
    assert system.engine.stats().stacked_adapter_bytes == 0
    assert system.runner.mixed_batch.delta("model.layers.0.self_attn.q_proj", x_TI) is None


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
