"""Adapters: their mathematics (`delta`), how they attach to a model (`linear`), what one is in memory (`weights`),
on disk (`peft_format`), where all are listed (`catalog`), kept (`store`), which shard holds which (`placement`), and
how many of them become one of low rank with a known error (`merging`, `sketching`, chosen by `merge_plan`)."""
