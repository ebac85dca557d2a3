"""Models whose weights, gradients and moments lie in shards on many ranks (FSDP2)."""

from dualsft.sharding.load import load_sharded
from dualsft.sharding.shard_model import is_sharded, shard_model
from dualsft.sharding.shards import local_shard, shard_offset

__all__ = ["is_sharded", "load_sharded", "local_shard", "shard_model", "shard_offset"]
