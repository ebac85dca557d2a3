"""Models whose weights, gradients and moments lie in shards on many ranks (FSDP2)."""

from dualsft.distributed.loading import load_sharded
from dualsft.distributed.sharding import is_sharded, shard_model
from dualsft.distributed.shards import local, shard_offset

__all__ = ["is_sharded", "load_sharded", "local", "shard_model", "shard_offset"]
