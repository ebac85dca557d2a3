"""Processes that claim one output folder at the same moment."""

import random
import shutil
import time
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from dualsft.errors import UserError
from dualsft.runs.folder import RunFolder, publish
from tests.world.forks import FORKS

RACES, RUNNERS = 240, 3
FILES = ("config.yaml", "metrics.json", "manifest.json")
VERBS: dict[str, dict[str, Any]] = {
    "select": {},
    "select --resume": {"resume": True},
    "fit --resume": {"resume": True, "result": "metrics.json"},
    "fit --overwrite": {"overwrite": True},
    "allocate": {"resumable": False},
    "allocate --overwrite": {"overwrite": True, "resumable": False},
    "export": {"resumable": False, "written": ("config.json", "*.safetensors")},
}
REFUSALS = (
    "Another process",
    "already holds files",
    "holds an unfinished run",
    "holds a finished run",
    "has written to",
)


@dataclass
class Run:
    """What became of one process's run; it had looked at the folder, claimed it and left it at these times."""

    looked: float = 0.0
    claimed: float = 0.0
    left: float = 0.0
    refusal: str = ""
    finished: bool = False


def run_once(folder: Path, name: str, verb: str, fails: bool, pause: float) -> Run:
    """As a command does it: look, load for a while, claim, stage, publish, and finish or fail."""
    found = Run()
    try:
        run = RunFolder(folder, **VERBS[verb])
        found.looked = time.monotonic()
        time.sleep(pause)
        run.claim({"seed": 0})
        found.claimed = time.monotonic()
        staged = run.staging()
        for file in FILES:
            (staged / file).write_text(name)
        publish(staged, folder, last=FILES[-1])
        found.left = time.monotonic()  # before the lock goes
        if fails:
            run.release()
        else:
            run.finish()
            found.finished = True
    except UserError as error:
        found.refusal = str(error)
    return found


def runner(name: str, barrier: Barrier, end: Connection) -> None:
    """A process that takes part in all races."""
    while (race := end.recv()) is not None:
        barrier.wait(30)
        end.send(run_once(race[0], name, *race[1:]))


def check(folder: Path, before: str, runs: dict[str, Run]) -> None:
    """Nobody worked while another did, or replaced what it had not seen; the folder is the last one's."""
    claimed = sorted((run for run in runs.values() if run.claimed), key=lambda run: run.claimed)
    refusals = [run.refusal for run in runs.values() if not run.claimed]
    assert all(any(words in refusal for words in REFUSALS) for refusal in refusals)
    assert all(not run.refusal for run in claimed)
    for first, second in pairwise(claimed):
        assert first.left <= second.claimed
        assert not first.finished or first.left <= second.looked
    names = {name for name, run in runs.items() if run.finished}
    last = max(names, key=lambda name: runs[name].left, default=None)
    held = {path.name: path.read_text() for path in folder.iterdir() if path.is_file()} if folder.is_dir() else {}
    if last is None:
        assert held in ({}, dict.fromkeys(FILES, before))
    elif not any(run.left > runs[last].left for run in claimed):
        assert held == dict.fromkeys(FILES, last)
    assert not (folder / ".unfinished").exists()
    if not before:
        assert claimed


@pytest.mark.heavy
def test_one_of_several_processes_gets_the_folder(tmp_path: Path) -> None:
    """Whatever they are asked to do, and whatever it held: one works, others are refused, and nobody's work is lost."""
    chance = random.Random(0)
    barrier, ends = FORKS.Barrier(RUNNERS), []
    for name in "abc"[:RUNNERS]:
        ours, theirs = FORKS.Pipe()
        FORKS.Process(target=runner, args=(name, barrier, theirs), daemon=True).start()
        ends.append(ours)
    refused = 0
    for race in range(RACES):
        folder, before = tmp_path / str(race), chance.choice(["", "", "old"])
        if before:
            old = run_once(folder, before, "select", False, 0.0)
            assert old.finished
        for end in ends:
            how = chance.choice(list(VERBS)), chance.random() < 0.2, chance.choice([0.0, 0.0, chance.random() * 0.005])
            end.send((folder, *how))
        runs = dict(zip("abc", (end.recv() for end in ends), strict=False))
        check(folder, before, runs)
        refused += sum(not run.claimed for run in runs.values())
        shutil.rmtree(folder, ignore_errors=True)
    for end in ends:
        end.send(None)
    assert refused > RACES
