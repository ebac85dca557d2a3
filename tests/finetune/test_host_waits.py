"""How often a fit makes the host wait for the accelerator."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from lightning import Callback, LightningModule
from lightning import Trainer as LightningTrainer

from dualsft.data import module as data_module
from dualsft.finetune import FitReport
from tests.world.accelerator import HostWaits
from tests.world.jobs import Workspace, trainer


class SecondStep(Callback):
    """Counts the waits of the second optimizer step: two batches, and what follows them up to the next one."""

    def __init__(self, seen: HostWaits) -> None:
        self._seen, self._counting = seen, ExitStack()

    def on_train_start(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        self._seen.place([*pl_module.parameters(), *pl_module.buffers()])

    def on_train_batch_start(
        self, trainer: LightningTrainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 2:
            self._counting.enter_context(self._seen.counted())
        elif batch_idx == 4:
            self._counting.close()


@pytest.mark.parametrize("packing", [False, True])
def test_a_step_makes_the_host_wait_once(
    packing: bool, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the losses of its batches, which must be finite; logging and the report wait for nothing more."""
    seen = HostWaits()

    def on_host(model: Any, batch: Any, dtype: Any) -> None:
        """Examples are taken apart where the host has them."""
        assert not any(map(seen.holds, batch.values()))

    monkeypatch.setattr("dualsft.finetune.module.check_packing", on_host)
    monkeypatch.setattr(data_module, "to_device", seen.moved(data_module.to_device))
    options: dict[str, Any] = {
        "max_epochs": 1,
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 1.0,
        "num_sanity_val_steps": 0,
    }
    fitting = trainer(tmp_path, callbacks=[FitReport(), SecondStep(seen)], **options, limit_val_batches=0)
    fitting.fit(workspace.module(), workspace.data(packing=packing, batch_tokens=100))
    by_model = {("masking_utils.py", "_local_scalar_dense"): 2} if packing else {}
    assert seen.waits == {("readout.py", "cpu"): 1, **by_model}
