"""``--trainer.strategy fsdp2``, ``hsdp`` or ``ddp``: each rank has its own examples, and a shard or a replica.

`FSDP2` is Lightning's ModelParallelStrategy, `DDP` its DDPStrategy without the wrapper around the module. Checkpoints
are those of a single process, one file with full tensors, so that a run can resume on another number of ranks. Under
`FSDP2` the trained parameters are vectors split over the ranks (`dualsft.sharding.vectors`). The module's state dict
gathers and splits them, and the strategy does the same for the optimizers' state of each.
"""

from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    Strategy,
    StrategyRegistry,
)
from torch import Tensor
from torch.optim import Optimizer

from dualsft.errors import UserError
from dualsft.models import PreTrainedModel
from dualsft.models.inspection import check_causal
from dualsft.models.loading import Dtype, load_model
from dualsft.sharding.groups import REPLICAS_WAIT, form_groups, shard_mesh
from dualsft.sharding.last_words import end_with_parent
from dualsft.sharding.load import load_sharded
from dualsft.sharding.shards import compute_device
from dualsft.sharding.vectors import gather_vectors, split_vectors

ShardSize = int | Literal["node"] | None
"""How many ranks hold one copy of the model: as many as a node has devices, or, if None, all."""


class FSDP2(ModelParallelStrategy):
    """Shards every weight, with its gradient and optimizer state, over ranks; each rank has its own examples.

    The training batches are those of a single process, in its order, and each rank reads its rows of them.

    With a shard size smaller than the number of ranks there are several copies of the model, each sharded over as many
    (hybrid sharding, HSDP). What a batch exchanges stays within a copy. Copies exchange their sums once, at the end of
    a pass, and the gradients of trained weights before each step.

    Args:
        cpu_offload: Store the shards on the host, and move a block to the accelerator while it computes.
        timeout: How long a rank waits for the others of its copy before it fails.
        shard_size: How many ranks, of consecutive numbers, hold one copy; ``node``: the devices of a node. None: all.
    """

    def __init__(
        self,
        cpu_offload: bool = False,
        timeout: timedelta | None = default_pg_timeout,
        shard_size: ShardSize = None,
    ) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=timeout)
        self.cpu_offload, self.shard_size, self._shards_wait = cpu_offload, shard_size, timeout

    def setup_environment(self) -> None:
        """Create the process group of all ranks, and those of each copy of the model, once.

        Raises:
            UserError: if the ranks cannot be divided into groups of the shard size.
        """
        if self._device_mesh is None:
            devices, ranks = self.num_processes, self.num_nodes * self.num_processes
            if shards_of(self.shard_size, devices, ranks) < ranks:
                self._timeout = max(REPLICAS_WAIT, self._shards_wait or REPLICAS_WAIT)
            self._setup_distributed()  # first, so that a refusal is said once
            _begin(self, checked_shard_size(self.shard_size, devices, ranks), self._shards_wait)
            self._device_mesh = shard_mesh(self.root_device.type)
        module = self.lightning_module
        assert module is not None
        module._device_mesh = self._device_mesh
        _deal_batches_ourselves(module)

    def model_to_device(self) -> None:
        """Move the module to the accelerator, except submodules with weights if these are offloaded to the host."""
        module = self.lightning_module
        assert module is not None
        if not self.cpu_offload:
            super().model_to_device()
            return
        for child in module.children():
            if next(child.parameters(), None) is None:
                child.to(self.root_device)
        module._device = self.root_device

    # the module gathers its own state and splits it, so that these are those of a single process
    lightning_restore_optimizer = Strategy.lightning_restore_optimizer
    lightning_module_state_dict = Strategy.lightning_module_state_dict
    load_model_state_dict = Strategy.load_model_state_dict

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """An optimizer's state; full on rank zero."""
        plain = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state, lengths = plain.state_dict(), _chunk_lengths(plain)
        # any other entry, such as the step, is the same on every rank
        chunks = {key: v for key, v in _tensors(state).items() if v.shape == (lengths[key[0]],)}
        return _replaced(state, zip(chunks, gather_vectors([*chunks.values()]), strict=True))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimizers' full states; each rank keeps its chunks of them."""
        states = zip(self.optimizers, checkpoint["optimizer_states"], strict=True)
        local = [_local_state(optimizer, state) for optimizer, state in states]
        Strategy.load_optimizer_state_dict(self, {"optimizer_states": local})

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the checkpoint that rank zero names."""
        return Strategy.load_checkpoint(self, self.broadcast(checkpoint_path), weights_only)

    def _get_process_group_backend(self) -> str:
        return _backends(self.root_device) or super()._get_process_group_backend()


class DDP(DDPStrategy):
    """Holds the whole model on every rank, each with its own examples.

    A pass over data communicates at its end alone, when the ranks' sums are added up. A step of a training adds up the
    gradients of the trained weights (`dualsft.training.compact`), where DistributedDataParallel would exchange those of
    all weights.

    Args:
        timeout: How long a rank waits for the others before it fails. It is long, as ranks meet only when the slowest
            has finished its pass; a rank whose process has ended is found out at once.
    """

    def __init__(self, timeout: timedelta | None = timedelta(days=1)) -> None:
        super().__init__(timeout=timeout)
        self._begun = False

    def setup_environment(self) -> None:
        """Create the process group of all ranks, once."""
        if not self._begun:
            super().setup_environment()
            _begin(self, shard_size=1)
            self._begun = True
        assert self.lightning_module is not None
        _deal_batches_ourselves(self.lightning_module)

    def configure_ddp(self) -> None:
        """Leave the module as it is."""

    def _get_process_group_backend(self) -> str:
        return _backends(self.root_device) or super()._get_process_group_backend()


def shards_of(shard_size: ShardSize, devices: int, ranks: int) -> int:
    """How many ranks are to hold one copy of the model."""
    return ranks if shard_size is None else devices if shard_size == "node" else shard_size


def checked_shard_size(shard_size: ShardSize, devices: int, ranks: int) -> int:
    """How many ranks hold one copy of the model, of this many, on nodes with this many devices each.

    Raises:
        UserError: if the ranks cannot be divided so.
    """
    size = shards_of(shard_size, devices, ranks)
    if size < 1 or ranks % size:
        raise UserError(
            f"trainer.strategy is to shard each copy of the model over {size} ranks, which does not divide the job's "
            f"{ranks}; give a shard_size that does."
        )
    if size == 1 < ranks:
        raise UserError(
            "trainer.strategy is to shard each copy of the model over a single rank; set trainer.strategy to ddp, "
            "under which each holds all weights, or to fsdp2, which shards them over all ranks."
        )
    return size


def _begin(strategy: ParallelStrategy, shard_size: int, timeout: timedelta | None = None) -> None:
    """Set up what the ranks need once they have found each other."""
    form_groups(shard_size, timeout)
    if isinstance(strategy.cluster_environment, LightningEnvironment) and strategy.local_rank > 0:
        end_with_parent()


def _deal_batches_ourselves(module: LightningModule) -> None:
    """Keep Lightning from dividing the batches between the ranks."""
    module.trainer._accelerator_connector.use_distributed_sampler = False


def _backends(device: torch.device) -> str | None:
    """The backends of a job on accelerators: gloo exchanges tensors on the host, such as scores."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else None


RANKS = (DDP, FSDP2)
"""The strategies of several ranks."""
StrategyRegistry.register("fsdp2", FSDP2, "Fully sharded weights (FSDP2)")
StrategyRegistry.register("hsdp", FSDP2, "A fully sharded copy of the weights on each node (FSDP2)", shard_size="node")
StrategyRegistry.register("fsdp2_cpu_offload", FSDP2, "Fully sharded weights (FSDP2) on the host", cpu_offload=True)

_Key = tuple[int, str]
"""A parameter's number in an optimizer's state dict, and the name of an entry of its state."""


def _tensors(state: dict[str, Any]) -> dict[_Key, Tensor]:
    entries = {(k, name): value for k, entry in state["state"].items() for name, value in entry.items()}
    return {key: value for key, value in entries.items() if isinstance(value, Tensor)}


def _chunk_lengths(optimizer: Optimizer) -> list[int]:
    """The length of this rank's chunk of each parameter, in the order of the state dict's numbers."""
    return [len(parameter) for group in optimizer.param_groups for parameter in group["params"]]


def _local_state(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's full state with this rank's chunks of the vectors in it."""
    lengths = _chunk_lengths(optimizer)
    vectors = {key: value for key, value in _tensors(state).items() if value.dim() == 1}
    chunks = split_vectors([*vectors.values()], [lengths[k] for k, _ in vectors])
    return _replaced(state, zip(vectors, chunks, strict=True))


def _replaced(state: dict[str, Any], tensors: Iterable[tuple[_Key, Tensor]]) -> dict[str, Any]:
    """A copy of an optimizer's state with other tensors."""
    new = dict(tensors)
    entries = {k: {n: new.get((k, n), value) for n, value in entry.items()} for k, entry in state["state"].items()}
    return {**state, "state": entries}


def launch_ranks(trainer: Trainer, module: LightningModule) -> None:
    """On several ranks, launch the missing ones, and create the process group before the trainer runs."""
    strategy = trainer.strategy
    if not isinstance(strategy, RANKS):
        return
    module.trainer = trainer
    if strategy.launcher is not None:
        strategy.launcher.launch(lambda: None, trainer=trainer)
    strategy.connect(module)
    strategy.setup_environment()


def load_for(module: LightningModule, name_or_path: str, dtype: Dtype) -> PreTrainedModel:
    """Load a module's model, by `load_sharded` if its trainer runs it under `FSDP2`, else by `load_model`.

    Raises:
        UserError: as these do, and if the model turns out not to be causal.
    """
    mesh = module.device_mesh
    if mesh is None:
        model = load_model(name_or_path, dtype)
    else:
        strategy = module.trainer.strategy
        assert isinstance(strategy, FSDP2)
        model = load_sharded(name_or_path, mesh, dtype, strategy.cpu_offload)
    check_causal(model, compute_device(model))
    return model
