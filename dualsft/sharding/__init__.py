"""Sharding weights, gradients, moments and scores over many ranks with FSDP2; all use of torch.distributed is here.

In: a model folder and a mesh of ranks. Out: a sharded model, collectives, and files of full tensors.
"""

from dualsft.sharding.load import load_sharded
from dualsft.sharding.shard_model import is_sharded, shard_model
from dualsft.sharding.shards import local_shard, shard_offset

__all__ = ["is_sharded", "load_sharded", "local_shard", "shard_model", "shard_offset"]
