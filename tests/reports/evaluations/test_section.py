"""The part of the page about evaluations."""

from pathlib import Path

import pytest

from dualsft import UserError
from dualsft.reports.blocks import Section, Table, Text
from dualsft.reports.evaluations.folder import read_evaluation
from dualsft.reports.evaluations.section import evaluations_section
from dualsft.reports.sources import Source
from tests.reports.cases import SCRIPT, write_evaluation, write_fit


def section(*folders: Path) -> Section:
    """All about some evaluations."""
    return evaluations_section([read_evaluation(Source(folder, folder.name, "evaluation")) for folder in folders])


def test_models_stand_beside_their_base(tmp_path: Path) -> None:
    """The base model, known from the fit's own settings, comes first; others have their change against it."""
    fit = write_fit(tmp_path / "fit")
    after = write_evaluation(tmp_path / "after", str(fit / "model"), 1.25)
    (part,) = section(after, write_evaluation(tmp_path / "before")).sections
    assert part.title == "On general.jsonl"
    (table,) = part.blocks
    assert isinstance(table, Table)
    assert list(table.head) == ["model", "loss", "exact_match"]
    assert [row[:2] for row in table.rows] == [["base/model (base model)", "1.000"], ["fit", "1.250 (+0.25)"]]


def test_answers_that_were_right_are_listed(tmp_path: Path) -> None:
    """What is right before and wrong after is forgotten, the other way round it is learnt."""
    fit = write_fit(tmp_path / "fit")
    before = write_evaluation(tmp_path / "before", correct=[True, True, False, False])
    after = write_evaluation(tmp_path / "after", str(fit / "model"), correct=[True, False, True, False])
    _, told, table = section(before, after).sections[0].blocks
    assert isinstance(told, Text)
    assert told.text == "fit forgot 1 of 4 answers, which were right before, and learnt 1."
    assert isinstance(table, Table)
    assert table.rows == [["1", f"1? {SCRIPT}", "True", "False"]]


def test_without_the_base_model_nothing_is_said_to_be_forgotten(tmp_path: Path) -> None:
    """The table stands alone, with a note."""
    fit = write_fit(tmp_path / "fit")
    table, note = section(write_evaluation(tmp_path / "after", str(fit / "model"))).sections[0].blocks
    assert isinstance(table, Table)
    assert table.rows[0][1] == "1.000"
    assert isinstance(note, Text)
    assert "base model was not evaluated" in note.text


def test_damaged_predictions_are_refused(tmp_path: Path) -> None:
    """By the name of their file."""
    before = write_evaluation(tmp_path / "before")
    after = write_evaluation(tmp_path / "after", str(write_fit(tmp_path / "fit") / "model"))
    (before / "predictions.jsonl").write_text('{"set": null}\n')
    with pytest.raises(UserError, match=r"predictions\.jsonl is damaged"):
        section(before, after)
