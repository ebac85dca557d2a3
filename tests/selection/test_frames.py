"""The depth of the call stack from the command to the mathematics, which is what a newcomer has to step through."""

import traceback
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import dualsft
from dualsft.matrix.tap import OutputTap
from dualsft.selection.passes import Passes
from tests.world.jobs import SGD, select, write_inputs

MOST_FRAMES = 10


def test_few_frames_between_select_and_the_first_tap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of our own code, in the pass that scores a tiny pool; both ends are counted."""
    run, tap = Passes.run_unsaved, OutputTap.__call__
    stacks: list[list[str]] = []
    current = ""

    def noted_run(self: Passes, name: str, *args: Any, **options: Any) -> Any:
        nonlocal current
        current = name
        return run(self, name, *args, **options)

    def noted_tap(self: OutputTap, module: nn.Module, *call: Any) -> Any:
        if current == "scores" and not stacks:
            ours = [f for f in traceback.extract_stack() if Path(dualsft.__file__).parent in Path(f.filename).parents]
            stacks.append([f"{Path(frame.filename).name}: {frame.name}" for frame in ours])
        return tap(self, module, *call)

    monkeypatch.setattr(Passes, "run_unsaved", noted_run)
    monkeypatch.setattr(OutputTap, "__call__", noted_tap)
    select(write_inputs(tmp_path / "inputs"), tmp_path / "out", SGD)
    (frames,) = stacks
    assert frames[0] == "trainer.py: select"
    assert frames[-1] == "chunks.py: supervised_values"
    assert len([*frames, "tap.py: __call__"]) <= MOST_FRAMES, frames
