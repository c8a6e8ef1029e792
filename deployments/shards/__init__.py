"""Where adapters lie: the shards, and the coordinator that asks and merges them."""
