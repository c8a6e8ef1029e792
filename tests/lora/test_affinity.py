"""Whom a request goes to: a replica that holds its adapters, unless too busy; and everybody decides alike."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.lora.affinity import ReplicaView, in_order, publish, view
from cluster.messages import AdapterRef, Mixture

REFS = [AdapterRef(f"d{index}", 1) for index in range(4)]
held = st.frozensets(st.sampled_from([str(ref) for ref in REFS]))
replicas = st.lists(st.builds(ReplicaView, st.uuids().map(str), st.integers(0, 12), held, held), min_size=1, max_size=6)
mixtures = st.dictionaries(st.sampled_from(REFS), st.floats(0.1, 1), max_size=3).map(Mixture.of)


def replica(name, load, *slots, host=()):
    return ReplicaView(name, load, frozenset(map(str, slots)), frozenset(map(str, host)))


@given(mixtures, replicas, st.integers(0, 10), st.randoms())
def test_the_choice_is_the_best_within_the_slack_whatever_the_order_of_the_replicas(mixture, views, slack, rng):
    chosen, *others = in_order(mixture, views, slack)
    least = min(one.load for one in views)
    assert chosen.load <= least + slack
    for other in others:
        assert other.load > least + slack or other.cost(mixture.refs) >= chosen.cost(mixture.refs)
        if other.load <= least + slack and other.cost(mixture.refs) == chosen.cost(mixture.refs) == 0:
            assert other.load >= chosen.load
    shuffled = rng.sample(views, len(views))
    assert in_order(mixture, shuffled, slack) == [chosen, *others]
    assert sorted([chosen, *others], key=lambda one: one.name) == sorted(views, key=lambda one: one.name)


def test_a_slot_is_better_than_memory_and_memory_better_than_nothing():
    mixture = Mixture.of({REFS[0]: 0.5, REFS[1]: 0.5})
    views = [replica("none", 0), replica("memory", 0, REFS[0], host=[REFS[1]]), replica("slots", 3, *REFS[:2])]
    assert [one.name for one in in_order(mixture, views, slack=5)] == ["slots", "memory", "none"]


def test_what_nobody_holds_has_one_home_whatever_the_loads_within_the_slack():
    mixtures = [Mixture.of({AdapterRef(f"new{index}", 1): 1.0}) for index in range(200)]
    names = [f"replica{index}" for index in range(4)]
    homes = [in_order(m, [replica(name, 0) for name in names], slack=4)[0].name for m in mixtures]
    again = [
        in_order(m, [replica(name, (i + j) % 5) for j, name in enumerate(names)], slack=4)[0].name
        for i, m in enumerate(mixtures)
    ]
    assert again == homes
    assert all(25 <= homes.count(name) <= 75 for name in names)


def test_a_mixture_has_its_heaviest_adapters_home():
    views = [replica(f"replica{index}", 0) for index in range(8)]
    for one in REFS:
        alone = in_order(Mixture.of({one: 1.0}), views, slack=0)[0]
        beside = Mixture.of({one: 0.75, **{other: 0.1 for other in REFS if other is not one}})
        assert in_order(beside, views, slack=0)[0] == alone


def test_a_mixture_that_is_merged_has_one_home_of_its_own_until_that_is_too_busy():
    mixtures = [Mixture.of({AdapterRef(f"d{i}", 1): 1.0 + index for i in range(9)}) for index in range(40)]
    names = "abcd"
    homes = [in_order(mixture, [replica(name, 0) for name in names], slack=2)[0].name for mixture in mixtures]
    again = [
        in_order(mixture, [replica(name, place % 3, REFS[0]) for place, name in enumerate(names)], slack=2)[0].name
        for mixture in mixtures
    ]
    assert again == homes
    assert set(homes) == set(names)
    busy = [replica(name, 3 * (name == homes[0])) for name in names]
    assert in_order(mixtures[0], busy, slack=2)[0].name != homes[0]


def test_a_domain_in_demand_spreads_over_the_replicas_by_itself():
    """Requests for one domain that end only when as many run as fit: each goes where the rule says, who gets one holds
    the adapter from then on."""
    hot, loads, holders = Mixture.of({REFS[0]: 1.0}), dict.fromkeys("abcd", 0), set()
    for _ in range(40):
        views = [replica(name, load, *([REFS[0]] if name in holders else [])) for name, load in loads.items()]
        name = in_order(hot, views, slack=3)[0].name
        loads[name] += 1
        holders.add(name)
    assert holders == set("abcd")
    assert max(loads.values()) - min(loads.values()) <= 4


def test_what_is_published_is_understood_and_a_newer_load_counts():
    published = publish(slots=[REFS[1], REFS[0]], host=[REFS[2]], load=7)
    assert published == publish(slots=[REFS[0], REFS[1]], host=[REFS[2]], load=7)
    assert view("a", published, None) == replica("a", 7, *REFS[:2], host=[REFS[2]])
    assert view("a", published, 3).load == 3
    assert view("a", {}, None) == replica("a", 0)
