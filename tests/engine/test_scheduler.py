"""What a step computes: turns, priorities, deadlines, chunks of prompts, preemption, prefixes that are found again."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.engine.block_pool import BLOCK_TOKENS, blocks_for
from cluster.engine.scheduler import MAX_UPCOMING
from cluster.engine.sequence import Sequence, SequenceStatus
from cluster.errors import InvalidInput, Overloaded
from cluster.messages import Mixture
from tests.engine.stepping import Stepper, mixture_of, ref


def ids_of(sequences: list[Sequence]) -> list[str]:
    return [sequence.request_id for sequence in sequences]


def test_first_come_first_served_within_a_mixture():
    stepper = Stepper(max_batch_size=2)
    for index in range(6):
        stepper.submit(f"r{index}", "a", max_tokens=3)
    assert ids_of(stepper.run()) == [f"r{index}" for index in range(6)]


def test_a_sequence_waiting_for_an_adapter_holds_up_nobody():
    stepper = Stepper()
    stepper.submit("law", "a")
    assert not stepper.scheduler.can_schedule()
    assert stepper.scheduler.wanted() == (ref("a"),)
    stepper.submit("base")
    assert ids_of([chunk.sequence for chunk in stepper.compute()]) == ["base"]
    stepper.load(ref("a"))
    assert stepper.scheduler.wanted() == ()
    assert ids_of([chunk.sequence for chunk in stepper.compute()]) == ["base", "law"]


def test_a_mixture_needs_all_its_adapters_at_once():
    stepper = Stepper()
    stepper.submit("r", "abc")
    for name in "abc":
        assert not stepper.scheduler.can_schedule()
        stepper.load(ref(name))
    assert stepper.scheduler.can_schedule()


def test_a_full_queue_and_an_id_in_use_are_refused():
    stepper = Stepper(max_batch_size=1, max_waiting=2)
    stepper.submit("runs")
    stepper.step()
    stepper.submit("waits")
    for taken in ("runs", "waits"):
        with pytest.raises(InvalidInput, match=f"'{taken}' is in use"):
            stepper.submit(taken)
    stepper.submit("r2")
    with pytest.raises(Overloaded, match="2 requests are waiting"):
        stepper.submit("r3")
    stepper.scheduler.withdraw("waits")
    stepper.submit("r3")


@settings(deadline=None, max_examples=40)
@given(
    requests=st.lists(st.tuples(st.integers(-2, 2), st.sampled_from(["", "a", "b"])), min_size=1, max_size=12),
)
def test_lower_priorities_go_first_whatever_the_domain(requests):
    stepper = Stepper(max_batch_size=1)
    for name in "ab":
        stepper.load(ref(name))
    for index, (priority, mixture) in enumerate(requests):
        stepper.submit(f"r{index}", mixture, priority=priority, max_tokens=2)
    done = [sequence.priority for sequence in stepper.run()]
    assert done == sorted(priority for priority, _ in requests)


def test_prompts_are_read_in_pieces_beside_sequences_that_generate():
    stepper = Stepper(max_batch_size=3, max_step_tokens=10)
    stepper.submit("first", prompt=4, max_tokens=30)
    stepper.submit("long", prompt=25, max_tokens=5)
    stepper.submit("short", prompt=3, max_tokens=5)
    sizes = [{chunk.sequence.request_id: chunk.num_tokens for chunk in stepper.step()} for _ in range(5)]
    assert sizes == [
        {"first": 4, "long": 6},
        {"first": 1, "long": 9},
        {"first": 1, "long": 9},
        {"first": 1, "long": 1, "short": 3},
        {"first": 1, "long": 1, "short": 1},
    ]


@settings(deadline=None, max_examples=40)
@given(
    prompts=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    max_step_tokens=st.integers(4, 40),
)
def test_any_chunk_size_gives_the_same_tokens(prompts, max_step_tokens):
    stepper = Stepper(max_step_tokens=max_step_tokens)
    for index, prompt in enumerate(prompts):
        stepper.submit(f"r{index}", prompt=prompt, max_tokens=4)
    for sequence in stepper.run():
        assert sequence.generated_ids == stepper.expected(sequence)


def test_what_is_late_is_taken_out_waiting_or_running():
    stepper = Stepper(max_batch_size=2)
    runs_late = stepper.submit("runs late", "a", deadline_s=10.0, max_tokens=50)
    runs = stepper.submit("runs", deadline_s=30.0, max_tokens=50)
    waits_late = stepper.submit("waits late", deadline_s=20.0)
    waits = stepper.submit("waits")
    stepper.step()
    assert stepper.scheduler.next_deadline_s == 10.0
    assert stepper.scheduler.expired(9.9) == []
    assert stepper.scheduler.expired(25.0) == [runs_late, waits_late]
    assert {s.status for s in (runs_late, waits_late)} == {SequenceStatus.DROPPED}
    assert not stepper.bank.pinned
    stepper.scheduler.check_integrity()
    assert stepper.scheduler.next_deadline_s == 30.0
    stepper.step()
    assert stepper.scheduler.running == [runs, waits]
    stepper.run()
    assert stepper.scheduler.expired(99.0) == []
    assert stepper.scheduler.next_deadline_s is None


def test_cancelling_frees_all_at_once():
    stepper = Stepper(num_blocks=20)
    sequence = stepper.submit("r", "ab", prompt=40, max_tokens=40)
    stepper.step()
    assert (stepper.pool.num_free, len(stepper.bank.pinned)) == (20 - blocks_for(40), 2)
    stepper.scheduler.retire(sequence, SequenceStatus.CANCELLED)
    assert (stepper.pool.num_free, len(stepper.bank.pinned)) == (20, 0)
    assert not stepper.scheduler.can_schedule()
    stepper.scheduler.check_integrity()
    assert stepper.scheduler.withdraw("r") is None


def test_the_least_urgent_gives_way_keeps_its_tokens_and_goes_on():
    """Six blocks for three sequences that come to need three each: the newest of the highest number gives way."""
    stepper = Stepper(num_blocks=6, reuse_prefixes=False)
    sequences = [
        stepper.submit(name, prompt=BLOCK_TOKENS - 1, max_tokens=2 * BLOCK_TOKENS, priority=priority)
        for name, priority in (("old", 1), ("urgent", 0), ("new", 1))
    ]
    old, urgent, new = sequences
    while not stepper.scheduler.num_preemptions:
        stepper.step()
    assert (old.num_preemptions, urgent.num_preemptions, new.num_preemptions) == (0, 0, 1)
    assert new.status is SequenceStatus.WAITING
    assert new.blocks == []
    kept = list(new.generated_ids)
    assert len(kept) > BLOCK_TOKENS
    assert ids_of(stepper.run())[-1] == "new"
    assert new.generated_ids[: len(kept)] == kept
    assert all(sequence.generated_ids == stepper.expected(sequence) for sequence in sequences)


def test_who_gave_way_goes_before_others_of_its_domain():
    stepper = Stepper(num_blocks=4, reuse_prefixes=False, max_batch_size=2)
    for index in range(4):
        stepper.submit(f"r{index}", prompt=BLOCK_TOKENS - 1, max_tokens=2 * BLOCK_TOKENS)
    done = stepper.run()
    assert done[1].num_preemptions
    assert ids_of(done) == ["r0", "r1", "r2", "r3"]


def test_what_is_computed_again_after_giving_way_is_not_charged_again():
    """Who gave way has been served less than the other; charged twice, its domain would come after the other's."""
    stepper = Stepper(num_blocks=4, reuse_prefixes=False, max_batch_size=2)
    for name in ("first y", "first x"):
        stepper.submit(name, name[-1], prompt=BLOCK_TOKENS - 1, max_tokens=2 * BLOCK_TOKENS)
    for name in ("second y", "second x"):
        stepper.submit(name, name[-1], prompt=8, max_tokens=4)
    first_y, first_x = stepper.scheduler.waiting["first y"], stepper.scheduler.waiting["first x"]
    while first_y.status is not SequenceStatus.FINISHED:
        stepper.step()
    assert first_x.num_preemptions == 1
    stepper.run()
    assert ids_of(stepper.finished) == ["first y", "second x", "second y", "first x"]


@settings(deadline=None, max_examples=40)
@given(
    requests=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50), st.integers(0, 2)), min_size=1, max_size=8),
    reuse=st.booleans(),
)
def test_sequences_that_fit_only_alone_all_end_and_none_works_in_vain_for_ever(requests, reuse):
    """The pool holds the largest and nothing beside it."""
    num_blocks = max(blocks_for(prompt + max_tokens) for prompt, max_tokens, _ in requests)
    stepper = Stepper(num_blocks=num_blocks, reuse_prefixes=reuse)
    for index, (prompt, max_tokens, priority) in enumerate(requests):
        stepper.submit(f"r{index}", prompt=prompt, max_tokens=max_tokens, priority=priority)
    # The most urgent one always goes on, so it takes no longer than one after the other would, each a step a token.
    done = stepper.run(max_steps=sum(prompt + max_tokens for prompt, max_tokens, _ in requests))
    assert len(done) == len(requests)
    assert all(sequence.generated_ids == stepper.expected(sequence) for sequence in done)


def test_a_long_prompt_waits_for_blocks_before_short_ones_behind_it():
    """Short ones arrive for ever, and would take each block as it comes free."""
    stepper = Stepper(num_blocks=10, max_batch_size=8)
    for index in range(4):
        stepper.submit(f"r{index}", prompt=8, max_tokens=12 + index)
    stepper.step()
    long = stepper.submit("long", prompt=9 * BLOCK_TOKENS, max_tokens=2)
    for index in range(4, 60):
        stepper.submit(f"r{index}", prompt=8, max_tokens=12)
        stepper.step()
    assert long.status is SequenceStatus.FINISHED


def test_a_prefix_is_computed_once_and_the_last_token_always():
    stepper = Stepper()
    prompt = list(range(3 * BLOCK_TOKENS))
    first = stepper.submit("first", "a", prompt=prompt, max_tokens=2)
    stepper.run()
    again = stepper.submit("again", "a", prompt=prompt, max_tokens=2)
    longer = stepper.submit("longer", "a", prompt=[*prompt, 1, 2], max_tokens=2)
    other = stepper.submit("other", "a", prompt=[*prompt[:-20], *[9] * 20], max_tokens=2)
    chunks = {chunk.sequence.request_id: chunk.num_tokens for chunk in stepper.step()}
    assert chunks == {"again": BLOCK_TOKENS, "longer": 2, "other": 2 * BLOCK_TOKENS}
    assert [s.num_reused for s in (first, again, longer, other)] == [0, 32, 48, 16]
    assert again.blocks[:2] == longer.blocks[:2]
    assert again.blocks[2] != longer.blocks[2], "the one that is computed anew is its own"
    stepper.run()
    assert again.generated_ids == first.generated_ids == stepper.expected(first)


def test_nothing_is_reused_across_mixtures_or_weights():
    stepper = Stepper(max_batch_size=8)
    prompt = list(range(40))
    mixtures = [Mixture(), *(Mixture.of({ref("a"): weight}) for weight in (0.5, 1.0)), Mixture.of({ref("b"): 0.5})]
    for index, mixture in enumerate(mixtures):
        stepper.submit(f"r{index}", mixture, prompt=prompt)
    done = stepper.run()
    assert [sequence.num_reused for sequence in done] == [0] * len(mixtures)
    assert len({stepper.scheduler.salt_of(sequence) for sequence in done}) == len(mixtures)


def test_salts_of_two_bases_differ():
    sequence = Stepper().submit("r", "a")
    assert Stepper(base="one").scheduler.salt_of(sequence) != Stepper(base="other").scheduler.salt_of(sequence)


def test_a_preempted_sequence_finds_its_own_blocks_again():
    stepper = Stepper(num_blocks=7)
    first = stepper.submit("first", prompt=20, max_tokens=60)
    second = stepper.submit("second", prompt=[2] * 20, max_tokens=30)
    while not second.num_preemptions:
        stepper.step()
    num_full = (second.num_tokens - 1) // BLOCK_TOKENS
    stepper.scheduler.retire(first, SequenceStatus.CANCELLED)
    stepper.step()
    assert second.num_reused == num_full * BLOCK_TOKENS > 2 * BLOCK_TOKENS
    stepper.run()
    assert second.generated_ids == stepper.expected(second)


def test_adapters_that_find_no_room_yet_are_announced_in_the_order_of_their_turns():
    stepper = Stepper(num_adapters=2)
    for name in "ab":
        stepper.load(ref(name))
    for index, mixture in enumerate(["a", "c", "ad", "bd", "e"]):
        stepper.submit(f"r{index}", mixture, max_tokens=3)
    # "b" may leave for "c"; "a" and "c" leave no room for what follows.
    assert stepper.scheduler.wanted() == (ref("c"),)
    assert stepper.scheduler.upcoming() == (ref("d"), ref("e"))
    seen = []
    while stepper.scheduler.waiting:
        seen += [wanted for wanted in stepper.scheduler.wanted() if wanted not in seen]
        stepper.step()
    assert [wanted for wanted in seen if wanted != ref("b")] == [ref("c"), ref("d"), ref("e")]


def test_no_more_than_a_few_dozen_adapters_are_announced():
    stepper = Stepper(num_adapters=1, max_waiting=200)
    stepper.load(ref("a"))
    for index in range(100):
        stepper.submit(f"r{index}", mixture_of([f"domain{index}"]))
    first, *upcoming = [ref(f"domain{index}") for index in range(100)]
    assert (stepper.scheduler.wanted(), stepper.scheduler.upcoming()) == ((first,), tuple(upcoming[:MAX_UPCOMING]))
