"""`diagnostics.json` and `parameters.parquet` beside the choice that they describe."""

import re
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from dualsft import load_selection
from dualsft.errors import UserError
from dualsft.selection import Selection
from dualsft.selection.diagnostics import Alignment, Basis, Diagnostics, Lengths, ScoreFigures, Sources, Target
from dualsft.selection.diagnostics.parameters import SCHEMA
from dualsft.selection.reallocation import reallocate
from tests.world.damage import damage_file, forget_checksums
from tests.world.jobs import ADAM, Inputs, contents, select

CHOICE: dict[str, Any] = {"data_budget": 3, "parameter_budget": 777}
PAGE = Path(__file__).parents[3] / "docs" / "reference" / "diagnostics.md"
FILES = ("diagnostics.json", "parameters.parquet")


@pytest.fixture(scope="module")
def made(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Selection:
    """A selection."""
    return select(inputs, tmp_path_factory.mktemp("selection") / "out", {**ADAM, **CHOICE})


def copy(made: Selection, folder: Path) -> Path:
    """A copy of it to be changed."""
    shutil.copytree(made.folder, folder)
    return folder


def test_they_are_read_as_they_were_written(made: Selection) -> None:
    """The text of the JSON is that of what is read from it; the manifest has the checksums of both."""
    text = (made.folder / "diagnostics.json").read_text(encoding="utf-8")
    assert Diagnostics.from_json(text) == made.diagnostics
    assert made.diagnostics.as_json() == text
    assert {*FILES} <= made.manifest["checksums"].keys()
    assert made.parameters.column_names[:6] == ["name", "layer", "kind", "size", "selected", "score_sum"]
    assert pq.read_table(made.folder / "parameters.parquet") == made.parameters


def test_those_of_an_earlier_release_are_computed(made: Selection, tmp_path: Path) -> None:
    """All that the stored scores tell; what only the run knew is missing."""
    older = copy(made, tmp_path / "older")
    for name in FILES:
        (older / name).unlink()
    found = load_selection(older)
    assert found.diagnostics == replace(made.diagnostics, basis=Basis())
    assert found.parameters == made.parameters


def test_another_allocation_has_its_own(made: Selection, inputs: Inputs, tmp_path: Path) -> None:
    """With the same budgets to the byte; with others as a selection with these would write them."""
    same = reallocate(made.folder, tmp_path / "same", **CHOICE)
    other = reallocate(made.folder, tmp_path / "other", data_budget=5, parameter_budget=0.5)
    fresh = select(inputs, tmp_path / "fresh", {**ADAM, "data_budget": 5, "parameter_budget": 0.5})
    for name in FILES:
        assert contents(same.folder)[name] == contents(made.folder)[name]
        assert contents(other.folder)[name] == contents(fresh.folder)[name] != contents(made.folder)[name]


@pytest.mark.parametrize("name", FILES)
def test_damage_is_told_in_one_sentence(made: Selection, tmp_path: Path, name: str) -> None:
    """Other bytes than were written are refused, and without a checksum so is what cannot be read."""
    damaged = copy(made, tmp_path / "damaged")
    damage_file(damaged / name, "flipped")
    what = "diagnostics" if name.endswith("json") else "parameters"
    with pytest.raises(UserError, match=f"{name} is damaged"):
        getattr(load_selection(damaged), what)
    (damaged / name).write_text('{"examples": []}')
    forget_checksums(damaged)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        getattr(load_selection(damaged), what)


def test_the_page_names_every_key_and_column() -> None:
    """Whoever looks one up finds it."""
    kinds = (Diagnostics, ScoreFigures, Lengths, Sources, Basis, Target, Alignment)
    keys = {of.name for kind in kinds for of in fields(kind)} - {"rows", "tokens", "pool_tokens", "selected_tokens"}
    assert {name for name in (*keys, *SCHEMA.names) if f"`{name}`" not in PAGE.read_text(encoding="utf-8")} == set()


def test_the_page_s_lines_of_python_run(made: Selection, capsys: pytest.CaptureFixture[str]) -> None:
    """They print what a tenth of the examples holds, and one line for each place."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    exec(code.replace("runs/selection", str(made.folder)), {})
    first, *places = capsys.readouterr().out.splitlines()
    assert float(first) == made.diagnostics.examples.capture[9]
    assert [line.split()[0] for line in places][-1] == "None"
