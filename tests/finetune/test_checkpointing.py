"""Which weights a fit ends with, early stopping, and the report."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from safetensors.torch import load_file

from dualsft.errors import UserError
from dualsft.finetune import ExportModel, best_checkpoint
from tests.world.fits import weights
from tests.world.jobs import Workspace, fit, trainer

OVERSHOOTING = ["--optimizer", "SGD", "--optimizer.lr", "2.0"]


class Noting(Callback):
    """Notes the loss and the weights of each validation."""

    def __init__(self) -> None:
        self.found: list[tuple[float, dict[str, Any]]] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.found.append((trainer.callback_metrics["val_loss"].item(), weights(pl_module)))


def turning(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """A schedule under which the loss falls for two epochs of five steps, and rises again in the third."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 10 else -1.0)


def test_export_of_the_best(workspace: Workspace, folder: Path) -> None:
    """The module ends with the weights of the validation with the lowest loss, which are not the last."""
    noting = Noting()
    best = ModelCheckpoint(folder, monitor="val_loss")
    module = workspace.module(export="best", lr_scheduler=turning)
    trainer(folder, max_epochs=3, callbacks=[noting, best]).fit(module, datamodule=workspace.data())
    assert noting.found[1][0] < min(noting.found[0][0], noting.found[2][0])
    assert module.best_step == 10
    assert all(torch.equal(weight, noting.found[1][1][name]) for name, weight in weights(module).items())


def test_what_best_needs(workspace: Workspace, folder: Path) -> None:
    """Without validation, or without a checkpoint by a metric, it is refused before anything is loaded."""
    for callbacks, data, words in (
        ([ModelCheckpoint(folder, monitor="val_loss")], {"validation": None}, "nothing is validated"),
        ([ModelCheckpoint(folder)], {}, "no checkpoint is kept by a metric"),
    ):
        module = workspace.module(export="best")
        with pytest.raises(UserError, match=words):
            trainer(folder, callbacks=callbacks).fit(module, datamodule=workspace.data(**data))
        assert not list(module.parameters())


@pytest.mark.filterwarnings("ignore:.ModelCheckpoint.monitor='val_loss':UserWarning")
def test_without_a_validation_the_last_are_kept(
    workspace: Workspace, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that ends before its first validation says so."""
    callbacks = [ModelCheckpoint(folder, monitor="val_loss", every_n_epochs=1)]
    module = workspace.module(export="best")
    trainer(folder, max_steps=2, callbacks=callbacks).fit(module, datamodule=workspace.data())
    assert module.best_step is None
    assert "the last ones are kept" in capsys.readouterr().err


def test_best_by_the_metric_that_stops(tmp_path: Path) -> None:
    """An EarlyStopping's metric and direction decide, a user's own monitor before it, the validation loss after it."""
    own = ModelCheckpoint(tmp_path, monitor="val_perplexity")
    stop = EarlyStopping("val_token_accuracy", mode="max")
    assert best_checkpoint(tmp_path, [stop, own]) is None
    found = [best_checkpoint(tmp_path, given) for given in ([ModelCheckpoint(tmp_path), stop], [])]
    assert [(c.monitor, c.mode) for c in found if c] == [("val_token_accuracy", "max"), ("val_loss", "min")]


@pytest.fixture
def stopping(tmp_path: Path) -> list[str]:
    """A configuration that stops early, and options under which it does."""
    callbacks = [{"class_path": "EarlyStopping", "init_args": {"monitor": "val_loss", "patience": 2}}]
    (tmp_path / "stop.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    samples = ["--model.samples.number", "1", "--model.samples.max_new_tokens", "4"]
    return ["--config", str(tmp_path / "stop.yaml"), *OVERSHOOTING, "--model.export", "best", *samples]


def test_early_stopping_by_configuration(
    workspace: Workspace, folder: Path, stopping: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The run ends after two validations that are no better, exports the best, and reports on base model and export."""
    fit(workspace, folder, *stopping, epochs=30)
    report = json.loads((folder / "metrics.json").read_text())
    assert report["steps"] == report["exported_step"] + 4 < 60
    best = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    delta = load_file(folder / "delta.safetensors")
    values = torch.cat([delta[name] for name in sorted(delta) if name.endswith(".value")])
    masters = torch.cat(list(best["state_dict"].values()))
    assert torch.equal(values.sort().values, masters.sort().values)
    base, exported = (trainer(folder).validate(module, datamodule=workspace.data(), verbose=False)[0] for module in (
        workspace.module(), workspace.module(model_name_or_path=str(folder / "model"), selection=None)
    ))  # fmt: skip
    told = report["validation"]
    assert told["step"] == report["exported_step"]
    assert told["base"] == pytest.approx({k.removeprefix("val_"): v for k, v in base.items()}, rel=1e-5)
    assert told["metrics"] == pytest.approx({k.removeprefix("val_"): v for k, v in exported.items()}, rel=1e-5)
    printed = capsys.readouterr().out
    assert re.search(rf"validation +\| base model \| +step {told['step']} \|", printed)
    assert f"loss           |      {told['base']['loss']:.4g} |" in printed
    assert f"step {told['step']} is exported" in printed
    assert "examples    17 an epoch" in printed


class PowerCut(Callback):
    """The end of the world, after a step's checkpoint."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self._step:
            raise RuntimeError("power cut")


def same_results(first: Path, second: Path) -> None:
    """Exports, samples and report are the same, apart from what it cost."""
    for name in ("model/model.safetensors", "delta.safetensors", "logs/samples.jsonl"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    costs = ("seconds", "tokens_per_second", "peak_memory_bytes")
    reports = [json.loads((folder / "metrics.json").read_text()) for folder in (first, second)]
    assert [report.pop(cost) > 0 for report in reports for cost in costs]
    assert reports[0] == reports[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
def test_a_run_that_was_cut_ends_as_an_unbroken_one(
    workspace: Workspace, folder: Path, stopping: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In mid-epoch, at an epoch's first step, and between the last step and the export: with averages, best and all."""
    average = ["--trainer.callbacks+", "EMAWeightAveraging", "--trainer.callbacks.decay", "0.5"]
    often = ["--trainer.callbacks+", "ModelCheckpoint", "--trainer.callbacks.every_n_train_steps", "1"]
    command = [*stopping, *average, *often, "--trainer.callbacks.dirpath"]
    fit(workspace, folder / "whole", *command, str(folder / "whole" / "own"), epochs=3)
    for step in (1, 3, 4):
        path = folder / str(step)
        cut = [
            "--trainer.callbacks+",
            "tests.finetune.test_checkpointing.PowerCut",
            "--trainer.callbacks.step",
            str(step),
        ]
        with pytest.raises(RuntimeError, match="power cut"):
            fit(workspace, path, *command, str(path / "own"), *cut, epochs=3)
        fit(workspace, path, *command, str(path / "own"), "--resume", epochs=3)
        same_results(folder / "whole", path)
    path = folder / "export"
    with monkeypatch.context() as broken:
        broken.setattr(ExportModel, "on_fit_end", lambda *_: (_ for _ in ()).throw(RuntimeError("power cut")))
        with pytest.raises(RuntimeError, match="power cut"):
            fit(workspace, path, *command, str(path / "own"), epochs=3)
    fit(workspace, path, *command, str(path / "own"), "--resume", epochs=3)
    same_results(folder / "whole", path)


def test_state_is_kept_every_few_minutes(workspace: Workspace, folder: Path) -> None:
    """Checkpoints come within an epoch too, as often as is asked for."""
    fit(workspace, folder / "often", "--model.save_minutes", "1e-6", epochs=1)
    fit(workspace, folder / "seldom", epochs=1)
    saved = {name: {path.stem for path in folder.glob(f"{name}/checkpoints/*.ckpt")} for name in ("often", "seldom")}
    assert saved["often"] - saved["seldom"] == {"recent"}
    with pytest.raises(UserError, match=r"model\.save_minutes is 0\.0"):
        fit(workspace, folder / "never", "--model.save_minutes", "0")
