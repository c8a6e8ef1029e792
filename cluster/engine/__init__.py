"""The engine: one continuous batch over sequences with different mixtures. Knows nothing of Ray, routing or HTTP.

One request's state (`sequence`); the keys and values of all (`kv_cache`); the adapters resident beside the base
(`slot_bank`); who runs next (`scheduler`); model, cache and mixtures to logits (`runner`); logits to a token
(`sampler`); tokens to text (`detokenizer`); and `engine`, whose `step()` goes through them in that order.
"""
