"""The parts of the page about fits."""

from pathlib import Path

import pytest

from dualsft import UserError
from dualsft.reports.blocks import Block, Example, Picture, Section, Table, Text
from dualsft.reports.fits.folder import read_fit
from dualsft.reports.fits.section import fit_section, fits_section
from dualsft.reports.sources import Source
from tests.reports.cases import sample, write_fit
from tests.world.jobs import fit, make_workspace

RIGHT_THEN_WRONG = [sample(0, "yes"), sample(4, "no")]


def section(folder: Path) -> Section:
    """All about a fit."""
    return fit_section(read_fit(Source(folder, folder.name, "fit")), "file")


def blocks(section: Section, title: str) -> list[Block]:
    """What a part shows."""
    return list(next(of for of in section.sections if of.title == title).blocks)


def test_the_story_and_the_final_table(tmp_path: Path) -> None:
    """What was trained, on what, and how each metric changed for better or worse."""
    lead, table = section(write_fit(tmp_path / "fit")).blocks
    assert isinstance(lead, Text)
    assert (
        "Trained 10% of the 100 weights of base/model on 6 examples, chosen by the selection runs/selection"
        in lead.text
    )
    assert "fell from 2.000 to 1.900 nats" in lead.text
    assert isinstance(table, Table)
    assert [row[0] for row in table.rows] == ["loss", "loss/target", "loss/general"]
    assert [row[3] for row in table.rows] == ["−0.100 (better)", "−0.500 (better)", "+0.300 (worse)"]


def test_curves_have_the_base_model_and_the_sets(tmp_path: Path) -> None:
    """The validations in numbers begin with the base model at step 0, one column a set."""
    (picture,) = blocks(section(write_fit(tmp_path / "fit")), "Losses")
    assert isinstance(picture, Picture)
    assert picture.numbers is not None
    assert list(picture.numbers.head) == ["step", "target", "general"]
    assert [list(row) for row in picture.numbers.rows] == [["0", "3.000", "1.000"], ["4", "2.500", "1.300"]]


def test_a_logged_base_model_is_step_0(tmp_path: Path) -> None:
    """A row outside of all epochs is that of the base model, and no second one is put before it."""
    folder = write_fit(tmp_path / "fit")
    table = folder / "logs" / "version_0" / "metrics.csv"
    head, *rows = table.read_text().splitlines()
    table.write_text("\n".join([head, ",0,,2.0,3.0,1.0", *rows]) + "\n")
    found = read_fit(Source(folder, "fit", "fit"))
    assert found.losses("val_loss/target") == ([0, 4], [3.0, 2.5])
    (picture,) = blocks(section(folder), "Losses")
    assert isinstance(picture, Picture)
    assert picture.numbers is not None
    assert [row[0] for row in picture.numbers.rows] == ["0", "4"]


def test_what_was_forgotten(tmp_path: Path) -> None:
    """Sets whose loss rose are listed, and answers that were right before and are wrong now."""
    sets, answers = blocks(section(write_fit(tmp_path / "fit", samples=RIGHT_THEN_WRONG)), "What the model forgot")
    assert isinstance(sets, Table)
    assert [list(row) for row in sets.rows] == [["general", "1.000", "1.300", "+0.300"]]
    assert isinstance(answers, Table)
    assert answers.rows[0][2:] == ["yes", "no"]


def test_samples_show_the_first_and_the_last_answer(tmp_path: Path) -> None:
    """Between them are others, which are left out; one prompt is one example."""
    found = [sample(0, "yes"), sample(0, "a", example_id=1), sample(2, "maybe"), sample(4, "no")]
    first, second = blocks(section(write_fit(tmp_path / "fit", samples=found)), "Samples before and after")
    assert isinstance(first, Example)
    text = "".join(piece.text for piece in first.pieces)
    assert "step 0: yes" in text
    assert "step 4: no" in text
    assert "maybe" not in text
    assert isinstance(second, Example)


def test_a_fit_that_kept_little_says_so(tmp_path: Path) -> None:
    """Without validations, logs and samples each part says what is missing."""
    folder = write_fit(tmp_path / "fit", after={})
    (folder / "logs" / "version_0" / "metrics.csv").unlink()
    (folder / "logs" / "samples.jsonl").unlink()
    made = section(folder)
    assert "not validated" in str(made.blocks[0])
    for title in ("Losses", "Samples before and after", "What the model forgot"):
        (only,) = blocks(made, title)
        assert isinstance(only, Text)
        assert only.kind == "note"


def test_fits_beside_each_other(tmp_path: Path) -> None:
    """The table begins with the base model where the fits agree on it; the curves of all are in one figure."""
    fits = [read_fit(Source(write_fit(tmp_path / name), name, "fit")) for name in ("a", "b")]
    table, picture = fits_section(fits).blocks
    assert isinstance(table, Table)
    assert [row[:4] for row in table.rows] == [
        ["base model", "–", "–", "2.000"],
        ["a", "6", "10%", "1.900"],
        ["b", "6", "10%", "1.900"],
    ]
    assert isinstance(picture, Picture)


@pytest.mark.parametrize("text", ["[]", "{", '{"steps": 1}'])
def test_other_metrics_are_refused(text: str, tmp_path: Path) -> None:
    """One sentence that names the file."""
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(UserError, match=r"metrics\.json is not that of a finished fit"):
        read_fit(Source(tmp_path, "x", "fit"))


@pytest.mark.slow
def test_a_real_fit_is_read(tmp_path: Path) -> None:
    """What `fit` writes today is what the page reads: figures, curves and settings."""
    workspace = make_workspace(tmp_path)
    fit(workspace, tmp_path / "fit", "--model.samples.number", "1", "--model.samples.max_new_tokens", "4", epochs=1)
    found = read_fit(Source(tmp_path / "fit", "fit", "fit"))
    assert found.figures.steps == 2
    assert found.losses("train_loss")[0] == [1.0, 2.0]
    assert found.losses("val_loss")[0][-1] == 2.0
    assert found.settings["model"]["selection"] == workspace.selection
    assert {of["step"] for of in found.samples} == {0, 2}
