"""Which examples a page shows, and how."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

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


@pytest.mark.parametrize("chosen_by", ["score", "quota"])
def test_strongly_negative_examples_are_listed(selection: Selection, chosen_by: str) -> None:
    """All rows are listed whose score is as far below zero as the last of the best is above, whatever was chosen."""
    found = subject(selection)
    if chosen_by == "quota":  # the highest, and others with next to no score
        least = np.argsort(np.where(found.rows.score > 0, found.rows.score, np.inf))[:3]
        found.rows.selected = np.isin(np.arange(len(found.rows.score)), [*found.order[:3], *least])
        assert found.cut == found.rows.score[least[0]]
    score = {row: value for row, value in enumerate(selection.examples["score"].to_pylist()) if value is not None}
    ranked = sorted(score.values(), reverse=True)
    strength = max(ranked[5], float(np.median([value for value in ranked if value > 0])))
    expected = sorted((row for row in score if score[row] <= -strength), key=lambda row: score[row])
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


@pytest.mark.parametrize("found_by", ["directory", "parents", "nothing"])
def test_a_pool_at_a_relative_path_is_found_from_elsewhere(
    selection: Selection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found_by: str
) -> None:
    """By the directory that select was run in, or beside the selection where a project was moved; else it is named."""
    project, pool = tmp_path / "project", selection.about.data.train.path
    assert isinstance(pool, str)
    copy = shutil.copytree(selection.folder, project / "runs" / "copy")
    shutil.copy(pool, project / "train.jsonl")
    text = (copy / "manifest.json").read_text().replace(pool, "train.jsonl")
    stored = {**json.loads(text), "directory": str(project)}
    if found_by == "parents":
        del stored["directory"]
    if found_by == "nothing":
        (project / "train.jsonl").unlink()
    (copy / "manifest.json").write_text(json.dumps(stored))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    records, lack = subject(load_selection(Path("../project/runs/copy"))).pool
    assert (records is not None) == (found_by != "nothing")
    assert (f"a relative path, of {project}; run report there" in lack) == (found_by == "nothing")
    assert Path.cwd() == tmp_path / "elsewhere"
