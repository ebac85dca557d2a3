"""Models whose weights, gradients and moments lie in shards on many ranks (FSDP2)."""

from dualsft.distributed.sharding import local, shard_model, shard_offset

__all__ = ["local", "shard_model", "shard_offset"]
