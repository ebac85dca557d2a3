"""Which examples a page shows, and how."""

import shutil
from pathlib import Path

from dualsft.reports.blocks import Example, Section, Text
from dualsft.reports.selections.examples import examples
from dualsft.reports.selections.suspects import suspects
from dualsft.selection import Selection, load_selection
from tests.reports.cases import subject


def shown(section: Section) -> dict[str, list[int]]:
    """Title of a group -> the rows that it shows."""
    return {
        part.title: [int(of.title.removeprefix("Example ")) for of in part.blocks if isinstance(of, Example)]
        for part in section.sections
    }


def test_groups_are_the_ends_and_the_cut(selection: Selection) -> None:
    """The highest, the last chosen, the first not chosen and the lowest rows, none of them twice."""
    score = dict(enumerate(selection.examples["score"].to_pylist()))
    order = sorted((row for row in score if score[row] is not None), key=lambda row: -score[row])
    chosen = set(selection.example_ids)
    groups = list(shown(examples(subject(selection))).values())
    assert groups[0] == order[:5]
    assert groups[1] == [row for row in order[5:] if row in chosen][-3:]
    assert groups[2] == [row for row in order if row not in chosen][:3]
    assert groups[3] == order[::-1][:5]


def test_tokens_are_coloured_with_their_text(selection: Selection) -> None:
    """An example's text is all that the model reads, its telling tokens are named, and its facts are told."""
    part = examples(subject(selection)).sections[0]
    best = part.blocks[0]
    assert isinstance(best, Example)
    row = int(best.title.removeprefix("Example "))
    record = subject(selection).record(row)
    assert record is not None
    text = "".join(piece.text for piece in best.pieces)
    assert record["prompt"] in text
    assert record["response"] in text
    assert max(abs(piece.level) for piece in best.pieces) == 5
    assert best.note.startswith("most for it: ")
    assert "place 1 of 23 · " in best.facts
    assert f"source {record['source']}" in best.facts


def without_pool(selection: Selection, folder: Path) -> Selection:
    """A copy that remembers a pool which is gone, and has no scores by token."""
    copy = shutil.copytree(selection.folder, folder / "copy")
    (copy / "token_scores.parquet").unlink()
    pool, text = selection.about.data.train.path, (copy / "manifest.json").read_text()
    assert isinstance(pool, str)
    (copy / "manifest.json").write_text(text.replace(pool, str(folder / "gone.jsonl")))
    return load_selection(copy)


def test_a_lost_pool_leaves_the_chosen_texts(selection: Selection, tmp_path: Path) -> None:
    """Chosen examples have their text from the selection itself, others say that it is not at hand, and why."""
    section = examples(subject(without_pool(selection, tmp_path)))
    notes = " ".join(block.text for block in section.blocks if isinstance(block, Text))
    assert "gone.jsonl" in notes
    assert "model.token_scores: true" in notes
    for part in section.sections:
        for block in part.blocks:
            assert isinstance(block, Example)
            text = "".join(piece.text for piece in block.pieces)
            assert ("not at hand" in text) == ("not chosen" in block.facts)


def test_strongly_negative_examples_are_listed(selection: Selection) -> None:
    """All rows are listed whose score is as far below zero as the last chosen one is above, the lowest first."""
    found = subject(selection)
    assert found.cut is not None
    assert found.cut > 0
    score = {row: value for row, value in enumerate(selection.examples["score"].to_pylist()) if value is not None}
    expected = sorted((row for row in score if score[row] <= -found.cut), key=lambda row: score[row])
    blocks = suspects(found)
    rows = [int(cells[0]) for block in blocks[1:] for cells in block.rows]  # type: ignore[union-attr]
    assert rows == expected
    assert isinstance(blocks[0], Text)
    assert expected or blocks[0].text.startswith("None")


def test_without_a_cut_there_is_no_border(selection: Selection) -> None:
    """Where all are chosen, only the ends are shown."""
    found = subject(selection)
    found.rows.selected = found.rows.scored.copy()
    assert list(shown(examples(found))) == ["Highest scores", "Lowest scores"]
