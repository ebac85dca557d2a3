"""Loggers of select and validate, which train nothing: they write once the run has its folder."""

import csv
from pathlib import Path

import pytest
import yaml

from dualsft.cli import run
from dualsft.errors import UserError
from tests.world.jobs import QUIET, Inputs, write_inputs, write_job


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    """A tiny model and its data."""
    return write_inputs(tmp_path)


def logged(folder: Path) -> list[dict[str, str]]:
    """The rows of the log in an output folder."""
    with open(folder / "logs" / "version_0" / "metrics.csv", newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_selection_and_an_evaluation_are_logged(inputs: Inputs, tmp_path: Path) -> None:
    """Each writes one row of figures and its settings; a finished run that is asked for again adds nothing."""
    model = {"preconditioner": "none", "warmup": {"fraction": 0.0}, "data_budget": 2}
    job = write_job(tmp_path, inputs, model=model, data={"max_length": 48})
    select = ["select", "--config", str(job), "--trainer.logger", "csv", "--output_dir", str(tmp_path / "s")]
    for again in ([], ["--resume"]):
        run([*select, *again])
        (row,) = logged(tmp_path / "s")
        assert (row["examples/selected"], row["step"]) == ("2.0", "0")
    settings = yaml.safe_load((tmp_path / "s" / "config.yaml").read_text(encoding="utf-8"))
    assert yaml.safe_load((tmp_path / "s" / "logs" / "version_0" / "hparams.yaml").read_text("utf-8")) == settings
    at = ["--model.model_name_or_path", inputs.model, "--data.validation", inputs.validation, *QUIET]
    run(["validate", *at, "--trainer.logger", "csv", "--output_dir", str(tmp_path / "v")])
    assert {"loss", "perplexity"} <= logged(tmp_path / "v")[0].keys()


def test_a_mistaken_name_leaves_no_trace(inputs: Inputs, tmp_path: Path) -> None:
    """It is told before anything is loaded or written."""
    at = ["--model.model_name_or_path", inputs.model, "--data.validation", inputs.validation, *QUIET]
    with pytest.raises(UserError, match=r"trainer\.logger is 'tensorbord'; give csv, tensorboard, wandb"):
        run(["validate", *at, "--trainer.logger", "tensorbord", "--output_dir", str(tmp_path / "v")])
    assert not (tmp_path / "v").exists()
