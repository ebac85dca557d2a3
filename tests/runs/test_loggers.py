"""Loggers by short names, and what a run without training tells them."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import loggers as lightnings
from lightning.pytorch.loggers import CSVLogger

from dualsft.errors import UserError
from dualsft.runs.loggers import log_results, make_loggers


def test_what_may_be_given(tmp_path: Path) -> None:
    """Names, loggers, lists of both and truth values; nothing is written when a logger is made."""
    own = CSVLogger(tmp_path / "own")
    assert make_loggers(None, tmp_path) == make_loggers(False, tmp_path) == []
    assert make_loggers(own, None) == [own]
    (first, second) = make_loggers(["csv", own], tmp_path / "out")
    assert (Path(str(first.log_dir)), second) == (tmp_path / "out" / "logs" / "version_0", own)
    (default,) = make_loggers(True, tmp_path, lambda folder: own)
    assert default is own
    assert list(tmp_path.iterdir()) == []


def test_names_that_are_none(tmp_path: Path) -> None:
    """They are refused with those that there are, as is a name without a folder to write to."""
    with pytest.raises(UserError, match=r"trainer\.logger is 'wandbb'; give csv, tensorboard, wandb or a list"):
        make_loggers(["csv", "wandbb"], tmp_path)
    with pytest.raises(UserError, match=r"trainer\.logger csv writes to the output folder, which is not given"):
        make_loggers("csv", None)


def test_a_package_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told which, and how to install it."""

    def missing(**options: Any) -> None:
        raise ModuleNotFoundError("no wandb here\nand more")

    monkeypatch.setattr(lightnings, "WandbLogger", missing)
    with pytest.raises(
        UserError, match=r"wandb needs a package .*\(no wandb here\); install it with `pip install wandb`"
    ):
        make_loggers("wandb", tmp_path)


def test_weights_and_biases_write_under_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run has the folder's name, and the project that the environment names or else ours."""
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(lightnings, "WandbLogger", lambda **options: made.append(options))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    make_loggers("wandb", tmp_path / "run-7")
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    make_loggers("wandb", tmp_path / "run-7")
    assert [options.pop("project") for options in made] == ["dualsft", "theirs"]
    assert made == [{"name": "run-7", "save_dir": tmp_path / "run-7" / "logs"}] * 2


def scalars(folder: Path) -> Iterator[tuple[str, int, float]]:
    """Tag, step and value of each scalar in the event files of a folder."""
    event_type = pytest.importorskip("tensorboardX.proto.event_pb2").Event
    for file in sorted(folder.glob("events.out.tfevents.*")):
        data = file.read_bytes()
        while data:  # a record: its length, a checksum of that, itself, and a checksum
            length = int.from_bytes(data[:8], "little")
            event = event_type.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    yield value.tag, event.step, value.simple_value


def test_results_are_logged(tmp_path: Path) -> None:
    """The settings are hyperparameters, and the metrics are of step 0, in every logger."""
    folder = tmp_path / "out"
    folder.mkdir()
    settings = {"model": {"dtype": None, "rate": 0.5}, "seed": 3}
    log_results(make_loggers(["csv", "tensorboard"], folder), folder, settings, {"loss": 0.25, "loss/a": 2})
    with open(folder / "logs" / "version_0" / "metrics.csv", encoding="utf-8") as stream:
        assert list(csv.DictReader(stream)) == [{"loss": "0.25", "loss/a": "2", "step": "0"}]
    stored = yaml.safe_load((folder / "logs" / "version_0" / "hparams.yaml").read_text(encoding="utf-8"))
    assert stored == settings
    assert list(scalars(folder / "logs" / "tensorboard")) == [("loss", 0, 0.25), ("loss/a", 0, 2.0)]
