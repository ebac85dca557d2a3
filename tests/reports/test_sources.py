"""Which directories a report is made of."""

from pathlib import Path

import pytest

from dualsft import UserError
from dualsft.reports.sources import find_sources
from tests.reports.cases import write_evaluation, write_fit


def folder(path: Path, *files: str) -> Path:
    """A folder with empty files."""
    path.mkdir(parents=True)
    for name in files:
        (path / name).touch()
    return path


def test_the_kind_is_told_by_its_files(tmp_path: Path) -> None:
    """Each command's directory is recognised by the file that it writes last, and taken once."""
    marks = {"selection": "manifest.json", "audit": "audit.json", "comparison": "table.md"}
    folders = [folder(tmp_path / kind, mark, "config.yaml") for kind, mark in marks.items()]
    folders += [write_fit(tmp_path / "fit"), write_evaluation(tmp_path / "evaluation")]
    found = find_sources([*folders, tmp_path / "fit" / ".." / "fit"])
    assert [(of.name, of.kind) for of in found] == [(kind, kind) for kind in (*marks, "fit", "evaluation")]


def test_names_are_the_ends_of_the_paths_that_differ(tmp_path: Path) -> None:
    """Directories of one name are told apart by those that they lie in."""
    found = find_sources([write_fit(tmp_path / run / "fit") for run in ("one", "two")])
    assert [of.name for of in found] == ["one/fit", "two/fit"]


@pytest.mark.parametrize(("files", "problem"), [(None, "no such directory"), (["weights.bin"], "holds no finished")])
def test_what_is_no_result_is_refused(files: list[str] | None, problem: str, tmp_path: Path) -> None:
    """A directory that is not there, or that no command wrote, ends in one sentence that names it."""
    path = tmp_path / "other"
    if files is not None:
        folder(path, *files)
    with pytest.raises(UserError, match=problem) as told:
        find_sources([path])
    assert str(path) in str(told.value)
