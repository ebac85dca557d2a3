"""``--trainer.strategy fsdp2``: Lightning's ModelParallelStrategy with all ranks in one data-parallel group.

Checkpoints are those of one process, a file with whole tensors, so that a run can go on on another number of ranks.
What is trained are vectors in pieces (`dualsft.sharding.vectors`): the module's state dict joins them and takes them
apart, and here the same is done for what the optimizers keep for each of them.
"""

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy, StrategyRegistry
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from dualsft.models.loading import Dtype, load_model
from dualsft.sharding.load import load_sharded
from dualsft.sharding.vectors import gather_vectors, split_vectors


class FSDP2(ModelParallelStrategy):
    """Each rank holds its shard of every weight, of all that is kept for each weight, and works on its own examples.

    Every rank is given all batches, in the order of one process, and takes its examples of each by itself.

    Args:
        cpu_offload: Keep the shards on the host, and bring a block to the accelerator while it is at work.
        timeout: How long a rank waits for the others before it gives up.
    """

    def __init__(self, cpu_offload: bool = False, timeout: timedelta | None = default_pg_timeout) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=timeout)
        self.cpu_offload = cpu_offload

    def setup_environment(self) -> None:
        """Join the group of all ranks, once."""
        if self._device_mesh is None:
            self._data_parallel_size = self.num_nodes * self.num_processes
            super().setup_environment()
        module = self.lightning_module
        assert module is not None
        module._device_mesh = self._device_mesh
        # Lightning would deal out batches between ranks
        module.trainer._accelerator_connector.use_distributed_sampler = False

    def model_to_device(self) -> None:
        """Move the module, but for what holds weights if these are to stay on the host."""
        module = self.lightning_module
        assert module is not None
        if not self.cpu_offload:
            super().model_to_device()
            return
        for part in module.children():
            if next(part.parameters(), None) is None:
                part.to(self.root_device)
        module._device = self.root_device

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether optimizers are restored when Lightning says so."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's state, whole on the first rank."""
        return Strategy.lightning_module_state_dict(self)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the module's state, of which each rank takes its part."""
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """An optimizer's state, whole on the first rank."""
        own = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state = own.state_dict()
        kept = _pieces(state["state"], _lengths(own))
        wholes = gather_vectors([state["state"][k][key] for k, key in kept])
        return _with(state, dict(zip(kept, wholes, strict=True)))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimizers' states, of which each rank takes its part."""
        states = zip(self.optimizers, checkpoint["optimizer_states"], strict=True)
        mine = [_own_state(optimizer, state) for optimizer, state in states]
        Strategy.load_optimizer_state_dict(self, {"optimizer_states": mine})

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, all ranks the same."""
        return Strategy.load_checkpoint(self, self.broadcast(checkpoint_path), weights_only)

    def _get_process_group_backend(self) -> str:
        # what is on the host, such as scores, is told over gloo
        return "cpu:gloo,cuda:nccl" if self.root_device.type == "cuda" else super()._get_process_group_backend()


_Key = tuple[int, str]
"""The number of a parameter, and what an optimizer keeps for it."""


def _lengths(optimizer: Optimizer) -> dict[int, int]:
    """How long this rank's piece of each parameter is, by the number that the state has for it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {k: len(parameter) for k, parameter in enumerate(parameters)}


def _pieces(state: Mapping[int, Mapping[str, Any]], lengths: Mapping[int, int]) -> list[_Key]:
    """What has an entry for each of the parameter's; all else is the same on every rank."""
    return [
        (k, key)
        for k, kept in state.items()
        for key, value in kept.items()
        if isinstance(value, Tensor) and value.shape == (lengths[k],)
    ]


def _own_state(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """This rank's part of an optimizer's state."""
    lengths = _lengths(optimizer)
    vectors = {
        (k, key): value
        for k, kept in state["state"].items()
        for key, value in kept.items()
        if isinstance(value, Tensor) and value.dim() == 1
    }
    pieces = split_vectors([*vectors.values()], [lengths[k] for k, _ in vectors])
    return _with(state, dict(zip(vectors, pieces, strict=True)))


def _with(state: dict[str, Any], changed: Mapping[_Key, Tensor]) -> dict[str, Any]:
    """The same state with other tensors."""
    kept = {k: {key: changed.get((k, key), value) for key, value in of.items()} for k, of in state["state"].items()}
    return {**state, "state": kept}


def join(trainer: Trainer, module: LightningModule) -> None:
    """Start the other ranks, if nobody has, and join them, for what they are to do together before the trainer runs.

    Args:
        trainer: Under `FSDP2`; under any other strategy nothing is done.
        module: What it is to run.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, FSDP2):
        return
    module.trainer = trainer
    if strategy.launcher is not None:
        strategy.launcher.launch(lambda: None, trainer=trainer)
    strategy.connect(module)
    strategy.setup_environment()


def load_for(module: LightningModule, name_or_path: str, dtype: Dtype) -> PreTrainedModel:
    """A model for a module that is set up: in shards if its trainer runs it under `FSDP2`, else see `load_model`.

    Raises:
        UserError: as `load_model` and `load_sharded` do.
    """
    mesh = module.device_mesh
    if mesh is None:
        return load_model(name_or_path, dtype)
    strategy = module.trainer.strategy
    assert isinstance(strategy, FSDP2)
    return load_sharded(name_or_path, mesh["data_parallel"], dtype, strategy.cpu_offload)


def register() -> None:
    """Make the strategy known to Lightning by its names."""
    if "fsdp2" not in StrategyRegistry:
        StrategyRegistry.register("fsdp2", FSDP2, description="Fully sharded weights (FSDP2)")
        StrategyRegistry.register(
            "fsdp2_cpu_offload", FSDP2, description="Fully sharded weights (FSDP2) on the host", cpu_offload=True
        )
