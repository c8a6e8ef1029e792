"""Serve's choice of a base replica, made by what the replicas hold (cluster/lora/affinity.py).

Serve pickles this module by value and runs it in every process with a handle to the replicas, so it imports little. It
leans on parts of Serve that are not public: a test on a real cluster holds it to the Ray that is pinned.
"""

import asyncio
import random
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from cluster.lora.affinity import in_order, view
from cluster.messages import GenerateRequest, ScoreRequest

STATS_PERIOD_S = 0.25
"""How often the controller asks replicas what they hold; it tells the routers when that changed."""


def router_config(slack: int) -> dict[str, Any]:
    """Serve's `request_router_config` for the deployment whose replicas hold adapters."""
    return {
        "request_router_class": f"{__name__}:AffinityRouter",
        "request_router_kwargs": {"slack": slack},
        "request_routing_stats_period_s": STATS_PERIOD_S,
    }


class AffinityRouter(RequestRouter):
    """Sends what is asked of a mixture to the best replica for it, any other call to the idler of two."""

    def initialize_state(self, **kwargs: int) -> None:
        """Called by Serve with what `router_config` says."""
        self._slack = kwargs["slack"]

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Called by Serve: groups of replicas, each to be tried only if none of the group before can take more."""
        if pending_request is not None:
            # Otherwise Serve would ask again without a pause when all are full.
            pending_request.routing_context.should_backoff = True
        request = pending_request.args[0] if pending_request is not None and pending_request.args else None
        if not isinstance(request, GenerateRequest | ScoreRequest) or not request.mixture.entries:
            return [random.sample(candidate_replicas, min(2, len(candidate_replicas))), candidate_replicas]
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        views = [
            view(name, replica.routing_stats, self.replica_queue_len_cache.get(replica.replica_id))
            for name, replica in by_name.items()
        ]
        return [[by_name[one.name]] for one in in_order(request.mixture, views, self._slack)]

    def _fulfill_next_pending_request(self, replica: RunningReplica, request_metadata: object = None) -> None:
        """The task that chose `replica` gives it to the request it chose it for.

        Serve's own would look the request up by an id that all calls share which one client's request leads to.
        """
        this_task = asyncio.current_task()
        for chosen, task in self._routing_task_by_pending_request_future.items():
            if task is this_task and not chosen.done():
                chosen.set_result(replica)
                return
