"""A fit that the system kills."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback

from dualsft.finetune.checkpoint_files import checkpoint_files
from tests.world.jobs import fit, fit_options, make_workspace
from tests.world.programs import run_program


class Kill(Callback):
    """Ends the process at a batch of the second epoch, without a chance to tidy up."""

    def __init__(self, batch: int) -> None:
        self._batch = batch

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (1, self._batch):
            os.kill(os.getpid(), signal.SIGKILL)


def masters(folder: Path) -> dict[str, torch.Tensor]:
    """What the last checkpoint of a run holds."""
    path = checkpoint_files([folder / "own"])[0]
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


@pytest.mark.heavy
def test_sigkill_within_an_accumulation(tmp_path: Path) -> None:
    """Killed between two batches of one step, in mid-epoch, a resumed run ends with the same masters and files."""
    workspace = make_workspace(tmp_path, torch.bfloat16)
    often = ["--trainer.callbacks+", "tests.world.jobs.SaveOften", "--trainer.callbacks.folder"]
    options = ["--trainer.limit_train_batches", "3", "--trainer.accumulate_grad_batches", "2"]
    options += ["--optimizer", "AdamW", "--optimizer.lr", "1e-3", "--model.loss", "token_mean"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    fit(workspace, whole, *options, *often, str(whole / "own"))
    command = [*options, *often, str(broken / "own")]
    kill = ["--trainer.callbacks+", "tests.finetune.test_kill.Kill", "--trainer.callbacks.batch", "1"]
    done = run_program(["dualsft", *fit_options(workspace, broken, *command, *kill)], tmp_path, os.environ)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in broken.glob("own/1-*")] == ["1-0.ckpt"]
    assert not (broken / "model").exists()
    fit(workspace, broken, *command, "--resume")
    expected, found = masters(whole), masters(broken)
    assert all(master.dtype == torch.float32 for master in found.values())
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    for name in ("model/model.safetensors", "delta.safetensors"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes()
