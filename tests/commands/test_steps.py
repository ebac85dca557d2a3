"""Commands as steps of one job: what they leave, and what becomes of the others when one fails."""

import os
from collections.abc import Mapping
from pathlib import Path
from threading import Event

import pytest
import torch

from dualsft.commands import steps as module
from dualsft.commands.steps import Steps, error_file, log_file
from dualsft.errors import UserError


def test_steps_in_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure is told in the command's own sentence, or by the exit code of its process; each step has its log.

    What a module prints when it is imported is no answer.
    """
    (tmp_path / "sitecustomize.py").write_text("print('welcome')\nprint('to my computer', end='')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    nothing = tmp_path / "nothing"
    with Steps(tmp_path / "logs", "steps", 3.0, parallel=1) as steps:
        assert steps.run("version", ["--version"], 1.0) > 0
        with pytest.raises(UserError, match=rf"^{nothing}: no such directory"):
            steps.run("report", ["report", nothing, "--output_dir", tmp_path / "page"], 1.0)
        with pytest.raises(UserError, match=r"dualsft select ended with exit code 0; see .*logs/help.txt"):
            steps.run("help", ["select", "--help"], 1.0)
    assert "$ dualsft --version\n" in capsys.readouterr().out
    assert log_file(tmp_path / "logs" / "version.json").read_text().startswith("dualsft ")
    assert "usage: dualsft select" in log_file(tmp_path / "logs" / "help.json").read_text()


class _Worker:
    """Does nothing, but fails at the step called bad."""

    def __init__(self, module: str, environment: Mapping[str, str]) -> None:
        assert environment == {"OMP_NUM_THREADS": "2"}, "half of four cores"

    def do(self, step: Path) -> int | None:
        if step.stem == "bad":
            error_file(step).write_text("It is bad.")
        return None

    def stop(self) -> None: ...


def test_a_failure_ends_the_steps_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is begun any more: what would go on for ever ends."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(module, "Worker", _Worker)
    begun = Event()

    def fails() -> float:
        begun.wait()
        return steps.run("bad", ["select"], 1.0)

    def goes_on() -> float:
        while True:
            steps.run("good", ["fit"], 1.0)
            begun.set()

    with pytest.raises(UserError, match="It is bad"), Steps(tmp_path / "logs", "steps", 3.0, parallel=2) as steps:
        steps.beside(fails, goes_on)
