"""Adapters: their mathematics (`delta`), how they attach to a model (`linear`), what one is in memory (`weights`),
on disk (`peft_format`), where all are listed (`catalog`), kept (`store`), and which shard holds which (`placement`)."""
