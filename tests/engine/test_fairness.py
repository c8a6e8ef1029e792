"""Whose turn it is, among many domains and in a slot bank too small for them: shares, bounded waits, few loads."""

import pytest

from cluster.engine.residency import PATIENCE_STEPS
from cluster.engine.sequence import Sequence, SequenceStatus
from cluster.messages import Mixture
from tests.engine.stepping import Stepper, adapter_of, ref


class Domain:
    """Keeps `num_in_flight` sequences waiting or running, of `max_tokens` tokens each, or of several sizes in turn."""

    def __init__(
        self, stepper: Stepper, mixture: str | Mixture, num_in_flight: int, prompt: int, max_tokens: int | list[int]
    ) -> None:
        self.sequences: list[Sequence] = []
        self._stepper, self._mixture, self._num_in_flight, self._prompt = stepper, mixture, num_in_flight, prompt
        self._sizes = [max_tokens] if isinstance(max_tokens, int) else max_tokens

    @property
    def num_finished(self) -> int:
        return sum(sequence.status is SequenceStatus.FINISHED for sequence in self.sequences)

    @property
    def served_tokens(self) -> int:
        """Prompts of those admitted, and all generated."""
        admitted = [sequence for sequence in self.sequences if sequence.blocks or sequence.generated_ids]
        return sum(sequence.num_tokens for sequence in admitted)

    def send(self) -> None:
        while len(self.sequences) - self.num_finished < self._num_in_flight:
            index = len(self.sequences)
            max_tokens = self._sizes[index % len(self._sizes)]
            name = f"{id(self)}-{index}"
            self.sequences.append(self._stepper.submit(name, self._mixture, prompt=self._prompt, max_tokens=max_tokens))


def steps_until_served(stepper: Stepper, waiting: Sequence, others: list[Domain], limit: int) -> int:
    """How many steps `waiting` takes to its first token while the others keep sending."""
    for num_steps in range(limit):
        if waiting.generated_ids:
            return num_steps
        for domain in others:
            domain.send()
        stepper.step()
    raise AssertionError(f"not served within {limit} steps")


@pytest.mark.parametrize(("prompt", "max_tokens", "num_in_flight"), [(8, 8, 6), (40, 4, 6), (4, 60, 6), (8, 8, 60)])
def test_domains_that_always_wait_get_the_same_tokens(prompt, max_tokens, num_in_flight):
    """However long or many the requests of one are. The bound is VTC's: twice what a batch may hold of one domain."""
    stepper = Stepper(max_waiting=1000, reuse_prefixes=False)
    one = Domain(stepper, "a", 6, prompt=8, max_tokens=8)
    other = Domain(stepper, "b", num_in_flight, prompt=prompt, max_tokens=max_tokens)
    bound = 2 * stepper.settings.max_batch_size * max(prompt + max_tokens, 16)
    for _ in range(400):
        one.send()
        other.send()
        stepper.step()
        assert abs(one.served_tokens - other.served_tokens) <= bound
    assert min(one.served_tokens, other.served_tokens) > 2 * bound


def test_what_was_served_when_nobody_else_asked_is_not_held_against_a_domain():
    stepper = Stepper(reuse_prefixes=False)
    early = Domain(stepper, "a", 8, prompt=8, max_tokens=8)
    for _ in range(200):
        early.send()
        stepper.step()
    before = early.served_tokens
    late = Domain(stepper, "b", 8, prompt=8, max_tokens=8)
    for _ in range(100):
        early.send()
        late.send()
        stepper.step()
    assert early.served_tokens - before == pytest.approx(late.served_tokens, abs=150)


def test_a_cold_domain_does_not_wait_behind_the_queue_of_a_hot_one():
    stepper = Stepper(max_waiting=1000)
    hot = Domain(stepper, "a", 300, prompt=8, max_tokens=20)
    hot.send()
    for _ in range(30):
        stepper.step()
    cold = stepper.submit("cold", "b")
    assert steps_until_served(stepper, cold, [hot], 25) <= 21


def test_domains_that_are_always_new_do_not_keep_out_one_that_has_been_served():
    """Each of 50 that wait at any time has a mixture of its own. The old one has its turn in every second round."""
    stepper = Stepper()
    old = Domain(stepper, "a", 3, prompt=30, max_tokens=4)
    num_new = 0
    for _ in range(300):
        old.send()
        while len(stepper.scheduler.waiting) < 53:
            num_new += 1
            mixture = Mixture.of({ref("a"): num_new / 4096, ref("b"): 1.0})
            stepper.submit(f"new{num_new}", mixture, prompt=4, max_tokens=2)
        stepper.step()
    num_turns = len(stepper.finished)
    assert num_turns > 400
    assert old.num_finished >= num_turns // 102


def test_accounts_of_domains_that_neither_wait_nor_run_are_closed():
    stepper = Stepper()
    for index in range(200):
        stepper.submit(f"r{index}", Mixture.of({ref("a"): (1 + index) / 64}), max_tokens=1)
        stepper.step()
    stepper.run()
    stepper.scheduler.check_integrity()  # asserts that the accounts are exactly those of waiting and running ones
    assert len(stepper.finished) == 200


def test_a_stream_of_one_domain_does_not_keep_another_out_of_a_bank_for_one():
    """A, B, A, A, A, ... for ever, one of A always running: each B is served within the stated bound."""
    stepper = Stepper(num_adapters=1)
    hot = Domain(stepper, "a", 6, prompt=8, max_tokens=[24, 5, 11, 17])
    for round_of_b in range(6):
        for _ in range(40 * (round_of_b % 3)):
            hot.send()
            stepper.step()
        cold = stepper.submit(f"b{round_of_b}", "b")
        steps_until_served(stepper, cold, [hot], PATIENCE_STEPS + 24 + 2)
    assert hot.num_finished > 50


def test_streams_that_take_turns_in_holding_their_adapters_do_not_keep_a_large_mixture_out():
    """`abc` needs the whole bank, whose places are always taken, by sequences that end at different times."""
    stepper = Stepper(num_adapters=3, max_batch_size=8)
    streams = [
        Domain(stepper, name, 3, prompt=4, max_tokens=sizes)
        for name, sizes in (("a", [7, 13]), ("b", [11, 5]), ("d", [13, 4]), ("e", [17, 6]), ("de", [3, 19]))
    ]
    for _ in range(100):
        for stream in streams:
            stream.send()
        stepper.step()
    # `e` and `de`, which came before, may first wait as long as that for a place, and then have PATIENCE_STEPS there.
    steps_until_served(stepper, stepper.submit("large", "abc"), streams, 2 * (PATIENCE_STEPS + 19) + 2)


def test_small_ones_do_not_fill_the_room_that_a_large_one_waits_for():
    """Whenever places fall free there are small ones for them; `xyz` needs three of the four at once."""
    stepper = Stepper(num_adapters=4, max_batch_size=8)
    for name in "pq":
        stepper.submit(name, name, max_tokens=60)
    small = [Domain(stepper, name, 1, prompt=4, max_tokens=[5, 3]) for name in "abcdefgh"]
    for _ in range(20):
        for domain in small:
            domain.send()
        stepper.step()
    # Those before it have two places while p and q run, then four, and PATIENCE_STEPS each.
    steps_until_served(stepper, stepper.submit("large", "xyz"), small, 3 * (PATIENCE_STEPS + 5))


def test_mixtures_that_share_an_adapter_need_room_for_it_once():
    stepper = Stepper(num_adapters=2)
    stepper.submit("known", "c")
    stepper.run()
    for index, (name, weight) in enumerate([("a", 0.5), ("a", 0.25), ("a", 1.0), ("b", 1.0), ("d", 1.0)]):
        stepper.submit(f"r{index}", Mixture.of({ref(name): weight}))
    assert stepper.scheduler.wanted() == (ref("a"), ref("b"))


def test_new_mixtures_of_a_resident_adapter_do_not_keep_another_out():
    stepper = Stepper(num_adapters=1)
    num_new = 0
    cold = None
    for step in range(2 * PATIENCE_STEPS):
        while len(stepper.scheduler.waiting) < 6:
            num_new += 1
            stepper.submit(f"new{num_new}", Mixture.of({ref("a"): num_new / 4096}), max_tokens=16)
        if step == 20:
            cold = stepper.submit("cold", "b")
        stepper.step()
    assert cold is not None
    assert cold.generated_ids


def test_base_requests_go_on_while_others_wait_for_room():
    stepper = Stepper(num_adapters=1)
    hot = Domain(stepper, "a", 4, prompt=4, max_tokens=30)
    for _ in range(PATIENCE_STEPS):
        hot.send()
        stepper.step()
    stepper.submit("cold", "b")
    for index in range(PATIENCE_STEPS):
        base = stepper.submit(f"base{index}", "", max_tokens=1)
        assert steps_until_served(stepper, base, [hot], 31) <= 31
        if index % 10 == 0:
            hot.send()


def test_an_adapter_that_was_never_seen_is_taken_for_as_large_as_the_others():
    """So that not a hundred are fetched for a bank that holds four."""
    stepper = Stepper(num_adapters=4)
    stepper.submit("first", Mixture.of({ref("d0"): 1.0}))
    stepper.step()
    for index in range(1, 100):
        stepper.submit(f"r{index}", Mixture.of({ref(f"d{index}"): 1.0}))
    assert len(stepper.scheduler.wanted()) == 3


def test_a_mixture_of_adapters_never_seen_is_tried_though_the_guess_says_it_is_too_large():
    stepper = Stepper(num_adapters=4, size_of=lambda name: 3 if name == ref("a") else 1)
    stepper.submit("a", "a")
    stepper.run()
    stepper.submit("bcd", "bcd")
    assert stepper.run()[-1].request_id == "bcd"


@pytest.mark.parametrize("num_adapters", [8, 16])
def test_a_working_set_of_twice_the_bank_is_served_in_large_batches_with_few_loads(num_adapters):
    """16 domains in turn, 16 requests in flight. One load per request, in batches of 8, is what thrashing gives."""
    stepper = Stepper(num_adapters=num_adapters, max_batch_size=16, max_step_tokens=256)
    num_sent = num_running = 0
    while len(stepper.finished) < 400:
        while num_sent < len(stepper.finished) + 16:
            name = f"d{num_sent % 16}"
            stepper.submit(f"r{num_sent}", Mixture.of({ref(name): 1.0}), prompt=20, max_tokens=16 + num_sent * 7 % 48)
            num_sent += 1
        stepper.step()
        num_running += len(stepper.scheduler.running)
    if num_adapters == 16:
        assert stepper.num_loads == 16
    else:
        assert stepper.num_loads < 0.6 * 400
        assert num_running / stepper.num_steps > 10


def test_what_is_loaded_for_the_first_in_turn_is_not_evicted_for_the_next():
    stepper = Stepper(num_adapters=2)
    for name in "abc":
        stepper.submit(name, name)
    assert set(stepper.scheduler.wanted()) == {ref("a"), ref("b"), ref("c")}, "their sizes are not known yet"
    for name in "abc":
        stepper.bank.add(ref(name), adapter_of(1), stepper.scheduler.spared_for(ref(name)))
    assert list(stepper.bank.resident) == [ref("a"), ref("b")]
    assert stepper.scheduler.wanted() == ()
