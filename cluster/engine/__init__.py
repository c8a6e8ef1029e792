"""The engine: one continuous batch over sequences with different mixtures. Knows nothing of Ray, routing or HTTP.

One request's state (`sequence`); who runs next (`scheduler`, with `fair_queue`, `residency`); the adapters resident
beside the base (`slot_bank`) and whose the blocks of keys and values are (`block_pool`); a step's tokens to logits
(`runner`: `native_runner` on the CPU, `torch_runner` with `kv_cache` anywhere); logits to a token (`sampler`);
tokens to text (`detokenizer`, `vocabulary`); and `engine`, whose `step()` goes through them in that order.
"""
