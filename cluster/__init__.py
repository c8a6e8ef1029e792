"""What Zephyra computes. Knows nothing of Ray, HTTP or gRPC: where things run is the business of `deployments`.

A prompt becomes tokens in five steps:

1. The gateway (deployments/api/gateway.py) turns HTTP or gRPC into one `ClientRequest` (cluster/messages.py).
2. Tiny ada (cluster/router/tiny_ada.py) reads the prompt: probabilities, then weights over domains, or none.
3. The catalog (cluster/lora/catalog.py) says which version of each domain is current: the `Mixture` is fixed.
4. The engine (cluster/engine/engine.py) queues the sequence. If an adapter is not resident, the replica has the
   coordinator (deployments/shards/coordinator.py) ask the shards (deployments/shards/adapter_shard.py) for it, while
   others decode.
   A mixture of more than eight is merged there to one adapter (deployments/shards/merger.py, cluster/lora/merging.py).
5. One continuous batch over sequences with different mixtures gives the next tokens: on a CPU in native kernels
   (cluster/kernels/), else in torch (cluster/lora/linear.py).
"""

DISTRIBUTION = "zephyra"
"""Marks this package as ours: PyPI has another `cluster`, which must not be imported in its place."""
