"""How many base replicas there should be: as many as hold the load with some room.

Serve pickles `desired_replicas` by value and runs it in its controller, so this module imports next to nothing.
"""

import math
from typing import Any

LOAD = "load"
TARGET_LOAD = 0.8
"""Of each replica: 1 is a full batch, or a full KV cache."""


def load_of(num_unfinished: int, batch_size: int, kv_used_share: float) -> float:
    """Of one replica, in batches: what runs and waits, or the KV blocks in use where those are the tighter limit."""
    return max(num_unfinished / batch_size, kv_used_share)


def autoscaling_config(
    min_replicas: int, max_replicas: int, upscale_delay_s: float, downscale_delay_s: float
) -> dict[str, Any]:
    """What Serve is given for the deployment."""
    return {
        "min_replicas": min_replicas,
        "max_replicas": max_replicas,
        "upscale_delay_s": upscale_delay_s,
        "downscale_delay_s": downscale_delay_s,
        "look_back_period_s": 5.0,
        "metrics_interval_s": 1.0,
        "policy": {"policy_function": "deployments.replica.autoscaling:desired_replicas"},
    }


def desired_replicas(context: Any) -> tuple[int, dict[str, Any]]:
    """Serve's policy: the loads of all replicas together over the target; Serve applies bounds and delays.

    Replicas that have told nothing yet leave the number as it is.
    """
    loads = (context.aggregated_metrics or {}).get(LOAD) or {}
    if not loads:
        return context.target_num_replicas, {}
    # A hair below a whole number is that number: averages over time are rounded.
    return max(1, math.ceil(sum(loads.values()) / TARGET_LOAD - 1e-9)), {}
