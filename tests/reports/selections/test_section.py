"""The parts of the page about a selection, against slow computations."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from dualsft.allocators import TopK
from dualsft.reports.blocks import Picture, Section, Table, Text
from dualsft.reports.selections.beside import selections_section
from dualsft.reports.selections.section import selection_section
from dualsft.reports.selections.story import story
from dualsft.selection import Selection
from tests.reports.cases import subject, write_selection_case


@pytest.fixture(scope="module")
def section(selection: Selection) -> Section:
    """All about the selection."""
    return selection_section(subject(selection))


def part(section: Section, title: str) -> Section:
    """A part by its title."""
    return next(of for of in section.sections if of.title == title)


def table(section: Section, caption: str) -> dict[str, list[str]]:
    """A table of a part: first column -> other columns."""
    blocks = [b.numbers if isinstance(b, Picture) else b for b in section.blocks]
    found = next(b for b in blocks if isinstance(b, Table) and b.caption.startswith(caption))
    return {row[0]: list(row[1:]) for row in found.rows}


def test_the_story_has_what_was_asked_and_came_out(section: Section) -> None:
    """One paragraph says from what, by what, how many of each, and what it cost."""
    lead = section.blocks[0]
    assert isinstance(lead, Text)
    assert lead.kind == "lead"
    for told in (
        "24 examples of train.jsonl",
        "validation.jsonl (2 rows)",
        "first order",
        "6 examples were chosen (25%)",
    ):
        assert told in lead.text
    assert "source 0 (50% of the pool)" in lead.text


def test_a_control_says_that_it_is_one(selection: Selection) -> None:
    """What chose it is told in place of what is odd about its scores."""
    found = subject(selection)  # with a manifest of its own
    found.selection.manifest["control"] = {"examples": "random", "weights": "all"}
    told = [block.text for block in story(found) if isinstance(block, Text) and block.kind == "caution"]
    assert told == ["A control: its choice was not made by the scores (examples: random, weights: all)."]


def test_parts_come_in_order_and_none_is_empty(section: Section) -> None:
    """Each part has something in it; what a selection lacks has no part."""
    titles = [of.title for of in section.sections]
    assert titles == [
        *("Where the weights are", "Scores and the cut", "Examples", "Examples that look wrong"),
        *("Score against length and loss", "Sources", "Other budgets", "Checks and costs"),
    ]
    assert all(of.blocks or of.sections for of in section.sections)


def test_kinds_add_up_to_the_mask(section: Section, selection: Selection) -> None:
    """The table by kind of module counts each weight once."""
    rows = table(part(section, "Where the weights are"), "The mask by kind")
    mask = selection.mask()
    totals = [sum(int(cells[k].replace(",", "")) for cells in rows.values()) for k in (0, 1)]
    assert totals == [sum(m.numel() for m in mask.values()), sum(int(m.sum()) for m in mask.values())]
    queries = [m for name, m in mask.items() if "q_proj" in name]
    assert rows["q"][1] == f"{sum(int(m.sum()) for m in queries):,}"


def test_sources_are_counted(section: Section, selection: Selection) -> None:
    """Each source has its rows and its chosen ones."""
    rows = table(part(section, "Sources"), "Examples by source")
    chosen = [row % 2 for row in selection.example_ids]
    assert {name: (cells[0], cells[2]) for name, cells in rows.items()} == {
        f"source {k}": ("12", str(chosen.count(k))) for k in (0, 1)
    }


def test_rows_that_could_not_be_chosen_are_told(section: Section) -> None:
    """Each reason has its count."""
    assert table(part(section, "Scores and the cut"), "Rows that") == {"response beyond data.max_length": ["1"]}


def test_budgets_capture_what_the_highest_scores_hold(section: Section, selection: Selection) -> None:
    """A budget's share is that of the highest scores among the positive sum."""
    score = np.clip([s for s in selection.examples["score"].to_pylist() if s is not None], 0, None)
    best = np.sort(score)[::-1]
    cells = table(part(section, "Other budgets"), "Positive score captured")["50%"]
    assert cells[0] == f"{best[:11].sum() / best.sum():.0%}"


def test_costs_have_each_phase(section: Section, selection: Selection) -> None:
    """Every phase has its row, and all together one."""
    rows = table(part(section, "Checks and costs"), "Time and memory")
    assert list(rows) == [*(of.name for of in selection.about.phases), "all"]


def test_overlaps_are_those_of_the_sets(selection: Selection) -> None:
    """Two selections have in common what both chose, beside what chance would give; orders of one pool are compared."""
    one, other = subject(selection), subject(selection)
    other.name, other.rows.selected = "other", np.roll(other.rows.selected, 1)
    beside = selections_section([one, other])
    rows = table(beside, "Overlap")
    both = len(set(selection.example_ids) & {(row + 1) % 24 for row in selection.example_ids})
    (cells,) = rows.values()
    assert cells == [f"{both / 6:.0%}", "26%", "100%", "10%", "1.00"]
    assert list(table(beside, "What each selection chose")) == [one.name, "other"]


class ByLoss(TopK):
    """The highest scores, which would look at the losses."""

    needs = ("loss",)


def test_losses_are_shown_where_they_are_known(tmp_path: Path) -> None:
    """A selection that measured them has a second map, one without says why there is none."""
    _, selection = write_selection_case(tmp_path, data_allocator=ByLoss(), token_scores=False)
    loss, score = (selection.examples[name].drop_null().to_numpy() for name in ("loss", "score"))
    blocks = part(selection_section(subject(selection)), "Score against length and loss").blocks
    told = [block.text for block in blocks if isinstance(block, Text)][1]
    assert f"rank correlation {spearmanr(loss, score).statistic:z.2f}" in told
    assert [block.name for block in blocks if isinstance(block, Picture)][1] == "file-score-against-loss"
