"""Sharding weights, gradients, moments and scores over many ranks with FSDP2; all use of torch.distributed is here.

In: a model folder and a mesh of ranks. Out: a sharded model, collectives, and files of full tensors.
"""
