"""Commands on a disk that takes no more: one sentence, and nothing left behind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dualsft.cli import run
from dualsft.errors import UserError
from dualsft.selection.reallocation import reallocate
from tests.world.damage import full_disk
from tests.world.jobs import QUIET, SGD, select, write_inputs


def refused(out: Path, write: Callable[[], Any], room: int) -> None:
    """Write on a disk that has so much room for each file."""
    sentence = rf"{out}\S* cannot be written \(File too large\); see that it has room"
    with pytest.raises(UserError, match=sentence), full_disk(room):
        write()
    assert not out.exists(), room


def test_allocate_leaves_nothing(tmp_path: Path) -> None:
    """Wherever it fails: at the description of the run, the table, or the mask."""
    out = tmp_path / "a"
    select(write_inputs(tmp_path / "inputs"), tmp_path / "s", SGD)
    for room in (10, 1_000, 3_000):
        refused(out, lambda: reallocate(tmp_path / "s", out, data_budget=0.5), room)
    reallocate(tmp_path / "s", out, data_budget=0.5)


def test_validate_leaves_nothing(tmp_path: Path) -> None:
    """The metrics have been computed by then."""
    inputs, out = write_inputs(tmp_path / "inputs"), tmp_path / "v"
    paths = ["--model.model_name_or_path", inputs.model, "--data.validation", inputs.validation]
    command = ["validate", *paths, *QUIET, "--verbose", "false", "--output_dir", str(out)]
    refused(out, lambda: run(command), 10)
    run(command)
    assert (out / "metrics.json").is_file()
