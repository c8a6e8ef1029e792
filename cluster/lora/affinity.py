"""Which base replica a request goes to: one that holds its adapters, unless that is the busier one by too much.

Every process decides alone, from what the replicas publish. What none holds goes to the same replica from everywhere,
by rendezvous hashing, before anybody has published that it came there. Knows nothing of requests or of Ray.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.lora.placement import ranked
from cluster.messages import MAX_CO_BATCHED, AdapterRef, Mixture

_SLOTS, _HOST, _LOAD = "slots", "host", "load"
_FETCH_COST, _LOAD_COST = 2, 1
"""Of an adapter that must come from a shard, and of one that need only come from the replica's own memory."""


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """What is known of one replica."""

    name: str
    load: int
    """Requests that it has not answered."""
    slots: frozenset[str] = frozenset()
    """Adapters in its slot bank."""
    host: frozenset[str] = frozenset()
    """Adapters in its memory."""

    def cost(self, refs: Iterable[AdapterRef]) -> int:
        """What is to be loaded before a request for `refs` can start."""
        return sum(
            0 if (name := str(ref)) in self.slots else _LOAD_COST if name in self.host else _FETCH_COST for ref in refs
        )


def publish(slots: Iterable[AdapterRef], host: Iterable[AdapterRef], load: int) -> dict[str, Any]:
    """What a replica tells of itself; sorted, so that it changes only when something did."""
    return {_SLOTS: sorted(map(str, slots)), _HOST: sorted(map(str, host)), _LOAD: load}


def view(name: str, published: Mapping[str, Any], load: int | None) -> ReplicaView:
    """A replica as `publish` described it, with a newer `load` if there is one."""
    known = published.get(_LOAD, 0) if load is None else load
    return ReplicaView(name, known, frozenset(published.get(_SLOTS, ())), frozenset(published.get(_HOST, ())))


def in_order(mixture: Mixture, replicas: Sequence[ReplicaView], slack: int) -> list[ReplicaView]:
    """`replicas`, the best for `mixture` first.

    Those with more than `slack` requests above the idlest come last, so that a domain in demand spreads: once another
    replica has had to load it, both hold it and share its requests. Among those that hold everything the idler goes
    first; among the others one and the same, so that they do not all load it.
    """
    is_merged = len(mixture.entries) > MAX_CO_BATCHED
    heaviest = max(mixture.entries, key=lambda entry: entry[1], default=None)
    key = mixture.key if heaviest is None or is_merged else str(heaviest[0])
    homes = {name: place for place, name in enumerate(ranked(key, [replica.name for replica in replicas]))}
    least = min((replica.load for replica in replicas), default=0)

    def rank(replica: ReplicaView) -> tuple[bool, int, int, int]:
        # What it is merged to has a name of its own, and lies at home once it was asked for.
        cost = _FETCH_COST if is_merged else replica.cost(mixture.refs)
        return replica.load > least + slack, cost, replica.load if cost == 0 else 0, homes[replica.name]

    return sorted(replicas, key=rank)
