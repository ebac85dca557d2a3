"""Models whose weights, gradients and moments lie in shards on many ranks (FSDP2)."""

from dualsft.distributed.loading import load_sharded
from dualsft.distributed.sharding import local, shard_model, shard_offset

__all__ = ["load_sharded", "local", "shard_model", "shard_offset"]
