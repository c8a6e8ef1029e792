"""The scheduler under random arrivals, adapters, cancellations, deadlines and pressure: the books hold, all ends."""

from collections.abc import Iterable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.engine.block_pool import BLOCK_TOKENS
from cluster.engine.sequence import Sequence, SequenceStatus
from cluster.messages import AdapterRef
from tests.engine.stepping import Stepper, ref

_NAMES = "abcde"


def _units(loaded: AdapterRef) -> int:
    """Adapters of one to three units."""
    return 1 + _NAMES.index(loaded.domain) % 3


class SchedulerMachine(RuleBasedStateMachine):
    """An engine's life. Its forward pass notices any token that is lost, repeated, or computed from a wrong block."""

    @initialize(
        num_blocks=st.integers(5, 14),
        num_adapters=st.integers(2, 7),
        max_batch_size=st.integers(1, 6),
        more_tokens=st.integers(0, 40),
        reuse=st.booleans(),
    )
    def start(self, num_blocks, num_adapters, max_batch_size, more_tokens, reuse):
        self.stepper = Stepper(
            num_adapters,
            num_blocks,
            reuse_prefixes=reuse,
            size_of=_units,
            max_batch_size=max_batch_size,
            max_step_tokens=max_batch_size + more_tokens,
        )
        self.now_s = 0.0
        self.submitted: list[Sequence] = []
        self.taken_out: list[Sequence] = []
        self.quiet_steps = 0
        """Steps since somebody was admitted."""

    @rule(
        mixture=st.sets(st.sampled_from(_NAMES), max_size=3).map(sorted).map("".join),
        shared=st.integers(0, 40),
        own=st.lists(st.integers(0, 1), min_size=1, max_size=12),
        max_tokens=st.integers(1, 25),
        priority=st.integers(-1, 1),
        wait_s=st.none() | st.integers(1, 30),
    )
    def submit(self, mixture, shared, own, max_tokens, priority, wait_s):
        self.submitted.append(
            self.stepper.submit(
                f"r{len(self.submitted)}",
                mixture,
                prompt=[0] * shared + own,
                max_tokens=max_tokens,
                priority=priority,
                deadline_s=None if wait_s is None else self.now_s + wait_s,
            )
        )

    @rule(name=st.sampled_from(_NAMES))
    def an_adapter_arrives_wanted_or_not(self, name):
        if _units(ref(name)) * 8 <= self.stepper.bank.budget_bytes:
            self.taken_out += self.stepper.load(ref(name))

    @rule()
    def the_first_wanted_adapter_arrives(self):
        for wanted in self.stepper.scheduler.wanted()[:1]:
            self.load_or_fail(wanted)

    @rule(num_steps=st.integers(1, 12))
    def step(self, num_steps):
        for _ in range(num_steps):
            self.compute()

    @precondition(lambda self: self.submitted)
    @rule(data=st.data())
    def cancel(self, data):
        sequence = data.draw(st.sampled_from(self.submitted))
        if sequence.status is SequenceStatus.RUNNING:
            self.stepper.scheduler.retire(sequence, SequenceStatus.CANCELLED)
            self.taken_out.append(sequence)
        elif self.stepper.scheduler.withdraw(sequence.request_id) is not None:
            sequence.status = SequenceStatus.CANCELLED
            self.taken_out.append(sequence)

    @rule(seconds=st.integers(1, 15))
    def time_passes(self, seconds):
        self.now_s += seconds
        scheduler = self.stepper.scheduler
        live = [*scheduler.running, *scheduler.waiting.values()]
        due = {s for s in live if s.deadline_s is not None and s.deadline_s <= self.now_s}
        late = scheduler.expired(self.now_s)
        assert set(late) == due
        assert all(sequence.status is SequenceStatus.DROPPED for sequence in late)
        self.taken_out += late

    @invariant()
    def the_books_hold(self):
        self.stepper.scheduler.check_integrity()

    @invariant()
    def what_waits_finds_its_adapters_in_the_bank_on_their_way_or_announced(self):
        scheduler, resident = self.stepper.scheduler, set(self.stepper.bank.resident)
        wanted, upcoming = scheduler.wanted(), scheduler.upcoming()
        needed = {ref for sequence in scheduler.waiting.values() for ref in sequence.refs}
        assert sorted([*wanted, *upcoming]) == sorted(needed - resident)

    def teardown(self):
        """No more arrivals: all that is left comes to its end, with the right tokens, and nothing stays held."""
        if not hasattr(self, "stepper"):
            return
        scheduler = self.stepper.scheduler
        for _ in range(200 + 100 * len(self.submitted)):
            if not (scheduler.running or scheduler.waiting):
                break
            wanted = scheduler.wanted()
            assert wanted or scheduler.can_schedule(), "it came to a halt with work left"
            self.load_all(wanted)
            self.compute()
        assert not scheduler.running
        assert not scheduler.waiting
        assert {*self.stepper.finished, *self.taken_out} == set(self.submitted)
        assert len(self.stepper.finished) + len(self.taken_out) == len(self.submitted)
        for sequence in self.stepper.finished:
            assert sequence.generated_ids == self.stepper.expected(sequence)
        assert self.stepper.pool.num_free == self.stepper.pool.num_blocks
        assert not self.stepper.bank.pinned
        assert scheduler.wanted() == ()
        assert not scheduler.can_schedule()

    def compute(self) -> None:
        """A step; nobody is preempted soon after an admission."""
        before, num_preemptions = set(self.stepper.scheduler.running), self.stepper.scheduler.num_preemptions
        chunks = self.stepper.compute()
        if self.stepper.scheduler.num_preemptions > num_preemptions:
            assert self.quiet_steps >= BLOCK_TOKENS
        self.quiet_steps = 0 if {chunk.sequence for chunk in chunks} - before else self.quiet_steps + 1

    def load_all(self, wanted: Iterable[AdapterRef]) -> None:
        for each in wanted:
            self.load_or_fail(each)

    def load_or_fail(self, wanted: AdapterRef) -> None:
        """An adapter larger than the bank cannot be had: what waits for it is withdrawn."""
        if _units(wanted) * 8 <= self.stepper.bank.budget_bytes:
            self.taken_out += self.stepper.load(wanted)
            return
        for sequence in [s for s in self.stepper.scheduler.waiting.values() if wanted in s.refs]:
            self.stepper.scheduler.withdraw(sequence.request_id)
            self.taken_out.append(sequence)


SchedulerMachine.TestCase.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)
TestSchedulerMachine = SchedulerMachine.TestCase
