"""The folder and the options of `dualsft quickstart`; what it shows is tested with the wheel."""

from pathlib import Path
from typing import Any

import pytest

from dualsft.cli import run
from dualsft.commands import quickstart
from dualsft.errors import UserError
from dualsft.quickstart.table import Row

LEFT = ("first-order-selection", "random-selection", "selection", "fit-random", "eval-random", "report", "logs")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What happens at the end of the steps, each of which leaves something of its own in the folder."""
    ends: list[Any] = []

    def rows(started: Any) -> list[Row]:
        for name in LEFT:
            (started._folder / name).touch()
        if ends:
            raise ends.pop()
        return []

    monkeypatch.setattr(quickstart.QuickStart, "rows", rows)
    monkeypatch.setattr(quickstart, "answers", lambda folder: [])
    return ends


def test_a_quick_start_can_be_replaced(steps: list[Any], tmp_path: Path) -> None:
    """As the messages say: one that was interrupted, and one that has finished; not one that a file was added to."""
    again = ["quickstart", "--output_dir", str(tmp_path / "out"), "--overwrite"]
    steps.append(KeyboardInterrupt())
    with pytest.raises(UserError, match="The quick start was interrupted; run it again with --overwrite"):
        run(again[:-1])
    with pytest.raises(UserError, match="holds an unfinished run; give --overwrite to drop it"):
        run(again[:-1])
    run(again)
    run(again)
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"files that no run of ours wrote \(notes.txt\)"):
        run(again)


@pytest.mark.parametrize("seed", ["-1", "4294967296", "1.5", "one"])
def test_a_seed_that_no_step_takes(seed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is refused before anything is written."""
    with pytest.raises(SystemExit):
        run(["quickstart", "--output_dir", str(tmp_path / "out"), "--seed", seed])
    assert f"'{seed}' is no seed; give a whole number from 0 to 4294967295" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
