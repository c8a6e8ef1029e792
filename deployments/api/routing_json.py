"""What HTTP says under `zephyra`: which adapters answered, with which weights, and how that came about."""

from dataclasses import asdict

from deployments.api.gateway import Routing
from deployments.api.openai_answers import Json


def routing_json(routing: Routing) -> Json:
    """A routing as a JSON object; `request_id` and `merged` only where there is one."""
    return {
        "mixture": {str(ref): weight for ref, weight in routing.mixture.entries},
        "probabilities": None if routing.probabilities is None else dict(routing.probabilities),
        "routing_ms": round(routing.routing_ms, 3),
        **({"request_id": routing.request_id} if routing.request_id else {}),
        **({} if routing.merged is None else {"merged": asdict(routing.merged)}),
    }
