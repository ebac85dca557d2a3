"""Progress of Lightning's loops."""

import re
from pathlib import Path

import pytest

from dualsft.cli import run
from dualsft.commands.progress_bar import PhaseBars
from tests.world.data import sums
from tests.world.jobs import write_inputs, write_job


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that name a configuration with a tiny model and a few rows."""
    folder = tmp_path_factory.mktemp("job")
    trainer = {"max_epochs": 2, "enable_checkpointing": False, "enable_progress_bar": True}
    config = write_job(folder, write_inputs(folder, sums(8), sums(3)), data={"batch_size": 4}, trainer=trainer)
    return ["--config", str(config)]


def told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines about phases on stderr, with times and losses left out."""
    lines = [line for line in capsys.readouterr().err.splitlines() if "done in" in line]
    return [re.sub(r"\d+:\d\d|loss .*", "_", line.removeprefix("dualsft: ")) for line in lines]


def test_a_fit_and_an_evaluation_have_numbered_phases(
    job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base model's validation and the training; validations in the training are no phases of their own."""
    run(["fit", *job, "--output_dir", str(tmp_path / "fit")])
    assert told(capsys) == ["[1/2] base model's validation: done in _", "[2/2] training: done in _, epoch 2/2, _"]
    run(["fit", *job, "--data.validation", "null", "--output_dir", str(tmp_path / "alone")])
    assert told(capsys) == ["[1/1] training: done in _, epoch 2/2, _"]
    run(["validate", *job])
    assert told(capsys) == ["[1/1] validation: done in _"]


@pytest.mark.parametrize("limit", ["1.0", "1"])
def test_bars_end_where_the_work_ends(limit: str, job: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a validation is whole, and counted by tokens, or cut, and counted by batches."""
    shares: list[float] = []
    end = PhaseBars.on_validation_end

    def look(bars: PhaseBars, *given: object) -> None:
        assert bars._validation is not None
        shares.append(bars._validation.share)
        end(bars, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(PhaseBars, "on_validation_end", look)
    run(["validate", *job, "--data.batch_tokens", "40", "--trainer.limit_val_batches", limit])
    assert shares == [1.0]
