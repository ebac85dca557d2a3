"""``--trainer.strategy fsdp2``: Lightning's ModelParallelStrategy with all ranks in one data-parallel group."""

import os
from datetime import timedelta

from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry


class FSDP2(ModelParallelStrategy):
    """Each rank holds its shard of every weight, of all that is kept for each weight, and works on its own examples.

    Args:
        cpu_offload: Keep the shards on the host, and bring a block to the accelerator while it is at work.
        timeout: How long a rank waits for the others before it gives up.
    """

    def __init__(self, cpu_offload: bool = False, timeout: timedelta | None = default_pg_timeout) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=timeout)
        self.cpu_offload = cpu_offload

    def setup_environment(self) -> None:
        """Join the group of all ranks."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def _get_process_group_backend(self) -> str:
        # what is on the host, such as scores, is told over gloo
        return "cpu:gloo,cuda:nccl" if self.root_device.type == "cuda" else super()._get_process_group_backend()


def register() -> None:
    """Make the strategy known to Lightning by its names."""
    if "fsdp2" not in StrategyRegistry:
        StrategyRegistry.register("fsdp2", FSDP2, description="Fully sharded weights (FSDP2)")
        StrategyRegistry.register(
            "fsdp2_cpu_offload", FSDP2, description="Fully sharded weights (FSDP2) on the host", cpu_offload=True
        )


def this_rank() -> int:
    """Which of the job's processes this is, also before they have joined: as the launcher's environment tells."""
    told = (os.environ.get(name) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))
    return int(next((value for value in told if value is not None), 0))
