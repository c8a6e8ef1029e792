"""Adapters: their mathematics (`delta`), how they attach to a model (`linear`), what one is in memory (`weights`),
on disk (`peft_format`) or handed in (`foreign`), where all are listed (`catalog`, `catalog_state`), where artifacts lie
(`store` and `bucket`, `checksums`; `artifacts` by what they are), and which shard holds which (`placement`)."""
