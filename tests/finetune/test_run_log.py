"""What a fit tells its loggers beside its losses."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dualsft.selection import load_selection
from tests.world.jobs import Workspace, fit


def rows(folder: Path) -> list[dict[str, str]]:
    """The rows of a fit's metrics.csv, without what is empty."""
    with open(folder / "logs" / "version_0" / "metrics.csv", newline="") as stream:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(stream)]


@pytest.fixture(scope="module")
def logs(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The folder of a fit of two epochs whose learning rate halves with each step, and what it logged elsewhere."""
    folder = tmp_path_factory.mktemp("logs")
    other = f"[csv, {{class_path: CSVLogger, init_args: {{save_dir: {folder / 'other'}, name: x}}}}]"
    schedule = ["--lr_scheduler", "ExponentialLR", "--lr_scheduler.gamma", "0.5"]
    fit(workspace, folder / "fit", "--trainer.logger", other, *schedule, epochs=2)
    (table,) = (folder / "other").rglob("metrics.csv")
    with open(table, newline="") as stream:
        return {"folder": folder / "fit", "other": list(csv.DictReader(stream))}


def test_the_base_model_is_step_zero(logs: dict[str, Any]) -> None:
    """The first row has the metrics of the base model, and no other row of the file those alone of a step before."""
    first, *others = rows(logs["folder"])
    assert first["step"] == "0"
    assert {"val_loss", "val_perplexity", "val_token_accuracy"} <= first.keys()
    assert "train_loss" not in first
    assert sum("val_loss" in row for row in others) == 2


def test_validations_are_logged_by_the_steps_before_them(logs: dict[str, Any]) -> None:
    """Each stands at the number of steps that were taken, as the final table tells the last; in every logger."""
    trained = [row for row in rows(logs["folder"]) if "train_loss" in row]
    each = len(trained) // 2
    validated = [(row["step"], row["epoch"]) for row in rows(logs["folder"]) if "val_loss" in row and "epoch" in row]
    assert validated == [(str(each), "0"), (str(2 * each), "1")]
    elsewhere = [row["step"] for row in logs["other"] if row["val_loss"]]
    assert elsewhere == ["0", str(each), str(2 * each)]
    figures = json.loads((logs["folder"] / "metrics.json").read_text(encoding="utf-8"))
    assert figures["validation"]["step"] == 2 * each


def test_learning_rates_are_those_of_the_steps(logs: dict[str, Any]) -> None:
    """Each training row has the rate that its step took, before the schedule went on."""
    rates = [float(row["lr"]) for row in rows(logs["folder"]) if "train_loss" in row]
    assert len(rates) > 2
    assert rates == pytest.approx([rates[0] * 0.5**k for k in range(len(rates))])


def test_throughput_goes_to_other_loggers(logs: dict[str, Any]) -> None:
    """The run's own file, which a repeated run leaves the same, goes without."""
    assert not any("tokens_per_second" in row for row in rows(logs["folder"]))
    found = [row for row in logs["other"] if row["tokens_per_second"]]
    trained = [row for row in logs["other"] if row["train_loss"]]
    assert [row["step"] for row in found] == [row["step"] for row in trained]
    assert all(float(row["tokens_per_second"]) > 0 for row in found)


def test_settings_and_selection_are_hyperparameters(logs: dict[str, Any], workspace: Workspace) -> None:
    """They are those of the run's configuration, and figures of the selection that it trains."""
    text = (logs["folder"] / "logs" / "version_0" / "hparams.yaml").read_text(encoding="utf-8")
    settings = yaml.safe_load((logs["folder"] / "config.yaml").read_text(encoding="utf-8"))
    stored = yaml.safe_load(text)
    chosen = stored.pop("selection")
    assert stored == settings
    assert chosen["examples/selected"] == load_selection(workspace.selection).about.counts.examples.selected
