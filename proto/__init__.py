"""The contract between router and shards: `shard.proto`, and the dataclasses both sides read."""
