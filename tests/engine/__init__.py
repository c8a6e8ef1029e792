"""The engine: sequences with different mixtures in one batch, against plain `generate` with merged weights."""
