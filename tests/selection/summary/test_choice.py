import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dualsft.data.records import read_records
from dualsft.selection import Selection
from dualsft.selection.summary import summary
from tests.world.data import LINES, VALIDATION
from tests.world.jobs import SGD, Inputs, select, write_inputs

ROWS = [{"prompt": f"{i}?", "response": "yes " * (1 + i % 4), "source": "ab"[i % 2]} for i in range(18)]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A pool of two sources."""
    return write_inputs(tmp_path_factory.mktemp("inputs"), ROWS, VALIDATION)


def test_the_choice_is_told_in_words(mixed: Inputs, tmp_path: Path) -> None:
    """Counts and shares on both sides, lengths of chosen, pool and target, sources, and where the mask fell."""
    made = select(mixed, tmp_path / "out", {**SGD, "data_budget": 6, "parameter_budget": 1000})
    lines = summary(made).splitlines()
    table, found = made.examples.to_pydict(), made.diagnostics
    held = sum(max(0, s) for s, chosen in zip(table["score"], table["selected"], strict=True) if chosen)
    tokens = sum(n for n, chosen in zip(table["num_tokens"], table["selected"], strict=True) if chosen)
    positive = sum(max(0, s) for s in table["score"])
    best = sum(sorted((max(0, s) for s in table["score"]), reverse=True)[:12])
    assert lines[0] == (
        f"examples    6 of 18 selected (18 scored): they hold {held / positive:.0%} of the positive score with "
        f"{tokens / sum(table['num_tokens']):.0%} of the supervised tokens; the best 12 (67%) would hold "
        f"{best / positive:.0%} of that score"
    )
    assert lines[1].startswith(f"lengths     median {found.lengths.selected['0.5']:.0f} of the chosen, ")
    of_a = sum(chosen for i, chosen in enumerate(table["selected"]) if i % 2 == 0)
    assert f"a {of_a / 6:.0%} of the chosen (50% of the pool)" in lines[2]
    assert lines[3].startswith("weights     1,000 of 25,120 selected (4.0%; 100% covered by the scores): they hold ")
    assert lines[4] == "places      " + places(made)


def places(made: Selection) -> str:
    """The densest places of a mask, counted by the names of its parameters."""
    groups: list[dict[str, list[Tensor]]] = [{}, {}]
    for name, mask in made.mask().items():
        layer, kind = re.search(r"layers\.(\d)", name), re.search(r"\.(q|k|v|o|gate|up|down)_proj", name)
        groups[0].setdefault(f"in layer {layer[1]}" if layer else "outside of layers", []).append(mask.flatten())
        groups[1].setdefault(kind[1] if kind else "other", []).append(mask.flatten())
    shares = [{name: float(torch.cat(masks).double().mean()) for name, masks in group.items()} for group in groups]
    best = [sorted(of.items(), key=lambda item: -item[1])[:3] for of in shares]
    layers, kinds = (", ".join(f"{name} ({share:.1%})" for name, share in of if share) for of in best)
    return f"densest {layers}; of modules in {kinds}"


def test_what_is_taken_whole_is_told_in_fewer_words(inputs: Inputs, tmp_path: Path) -> None:
    """There are no shares of everything, and no places; a pool without sources has no line of them."""
    lines = summary(select(inputs, tmp_path / "out", {**SGD, "data_budget": None, "parameter_budget": None}))
    assert "examples    8 of 10 selected (8 scored, 1 empty, 1 truncated)\n" in lines
    assert "(100.0%; 100% covered by the scores)\n" in lines
    assert "places" not in lines
    assert "sources" not in lines


def test_rows_around_the_cut_are_shown(mixed: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The five best, the last chosen with the first left, and the five worst: in order of score, no line too wide."""
    monkeypatch.setenv("COLUMNS", "60")
    made = select(mixed, tmp_path / "out", {**SGD, "data_budget": 7})
    lines = summary(made, records=read_records(mixed.train)).splitlines()
    places = [lines.index(next(li for li in lines if li.startswith(t))) for t in ("best rows ", "border", "worst")]
    shown = [lines[place + 1 : place + 1 + count] for place, count in zip(places, (5, 4, 5), strict=True)]
    ranked = sorted(enumerate(made.examples["score"].to_pylist()), key=lambda row: -row[1])
    numbers = [[int(line[2:10]) for line in part] for part in shown]
    order = [i for i, _ in ranked]
    assert numbers == [order[:5], order[5:9], order[-5:]]
    assert [line[0] for part in shown for line in part] == [*"*****", *"**  ", *"     "]
    assert all(len(line) <= 60 for part in shown for line in part)
    assert shown[0][0].split(maxsplit=3)[3].startswith(f"{order[0]}? yes")


def test_a_small_pool_is_shown_once(inputs: Inputs, tmp_path: Path) -> None:
    """All rows that have scores, those of other kinds left out."""
    made = select(inputs, tmp_path / "out", {**SGD, "data_budget": 3})
    text = summary(made, records=read_records(inputs.train))
    assert "all rows  " in text
    assert "border" not in text
    assert sum(line[:10].strip(" *").isdigit() for line in text.splitlines()) == 8
    assert len(LINES) == 10
