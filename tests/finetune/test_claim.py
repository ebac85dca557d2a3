"""The output folder of a fit: finished ones, and what happens to it meanwhile."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from lightning import Callback

from dualsft.errors import UserError
from tests.world.jobs import Workspace, fit


def test_a_finished_fit_resumes_to_nothing(
    workspace: Workspace, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command, wherever its data are cached, says so and changes no file; other settings are refused."""
    fit(workspace, folder, epochs=1)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    capsys.readouterr()
    fit(workspace, folder, "--resume", "--data.cache_dir", "elsewhere", epochs=1)
    assert capsys.readouterr().out == f"{folder} holds this run, finished: nothing is left to do\n"
    for other, named in (
        (["--seed_everything", "7"], "seed_everything"),
        (["--optimizer", "SGD", "--optimizer.lr", "1"], "optimizer"),
        (["--trainer.max_steps", "9"], "trainer"),
    ):
        with pytest.raises(UserError, match=rf"holds a finished run with other settings \({named}\)"):
            fit(workspace, folder, "--resume", *other, epochs=1)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    (folder / "config.yaml").write_text("[")
    with pytest.raises(UserError, match="with other settings"):
        fit(workspace, folder, "--resume", epochs=1)


class Remove(Callback):
    """Removes the output folder, or one in it, in the first epoch or before it; perhaps makes another run's there."""

    def __init__(self, folder: str, again: bool = False, before: bool = False) -> None:
        self._folder, self._again, self._before = Path(folder), again, before

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if self._before:
            shutil.rmtree(self._folder)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1 and not self._before:
            shutil.rmtree(self._folder)
            if self._again:
                (self._folder / ".unfinished").mkdir(parents=True)
                for name in ("lock", "run.json"):
                    (self._folder / ".unfinished" / name).write_text(json.dumps({"command": "another"}))


@pytest.mark.parametrize("again", [False, True])
def test_a_folder_that_is_removed_meanwhile(workspace: Workspace, folder: Path, again: bool) -> None:
    """The fit ends at once, in a sentence, and writes nothing into what another run has put there."""
    remove = ["--trainer.callbacks+", "tests.finetune.test_claim.Remove", "--trainer.callbacks.folder", str(folder)]
    with pytest.raises(UserError, match="was removed, or taken over"):
        fit(workspace, folder, *remove, "--trainer.callbacks.again", str(again).lower())
    found = sorted(path for path in os.listdir(folder)) if folder.exists() else []
    assert found == ([".unfinished"] if again else [])


@pytest.mark.parametrize("before", [False, True])
def test_the_log_is_removed_meanwhile(workspace: Workspace, folder: Path, before: bool) -> None:
    """The fit ends in a sentence that says so, rather than with a log without its first rows."""
    logs = str(folder / "logs")
    remove = ["--trainer.callbacks+", "tests.finetune.test_claim.Remove", "--trainer.callbacks.folder", logs]
    often = ["--trainer.log_every_n_steps", "1", "--trainer.callbacks.before", str(before).lower()]
    with pytest.raises(UserError, match=r"logs\S* (was removed|.*folder is gone).*leave \w+ output folder alone while"):
        fit(workspace, folder, *remove, *often)
