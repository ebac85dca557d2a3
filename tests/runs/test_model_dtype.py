"""What ``model.dtype: auto`` is in a selection, in the fit of it, and in its plan."""

import json
from pathlib import Path

import pytest
import torch

from dualsft.cli import run
from dualsft.models import dtypes
from tests.world.fits import trainer
from tests.world.jobs import make_workspace


def test_selection_fit_and_plan_take_float32_where_bfloat16_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The manifest tells the type that was taken, the fit takes the same, which says so, and the plan counts it."""
    monkeypatch.setattr(dtypes, "has_bfloat16_units", lambda: False)
    workspace = make_workspace(tmp_path, torch.bfloat16)
    manifest = json.loads((Path(workspace.selection) / "manifest.json").read_text())
    assert (manifest["model"]["dtype"], manifest["model"]["compute_dtype"]) == ("float32", "float32")
    module = workspace.module()
    trainer(tmp_path, max_epochs=1).fit(module, datamodule=workspace.data())
    assert module.model.dtype == torch.float32
    assert capsys.readouterr().err.count("is stored in bfloat16, in which this CPU computes several times slower") == 1
    options = ["--model.model_name_or_path", workspace.model, "--data.train", "pool.jsonl", "--data.max_length", "16"]
    run(["plan", *options, "--trainer.accelerator", "cpu", "--data.validation", "v.jsonl", "--data.batch_tokens", "64"])
    assert "weights in float32, on 1 process on the CPU" in capsys.readouterr().out
