"""Grids in files, and what is said of one that is wrong."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from dualsft.errors import UserError
from dualsft.experiments.grid import Budgets
from dualsft.experiments.grid_file import as_yaml, grid_from, read_grid

GRID: dict[str, Any] = {
    "config": "job.yaml",
    "methods": {
        "both": None,
        "less then lift": {"data": {"model.data_allocator": "less"}, "parameters": {}},
        "lora": {"adapter": {"peft_type": "LORA"}, "fit": {"optimizer.lr": "1e-3"}},
    },
    "budgets": [{"data": 0.1, "parameters": 20}, {"data": None}],
    "seeds": [0, 1],
    "evaluations": {
        "target": {"data": "target.jsonl", "max_new_tokens": 4, "group": "plasticity"},
        "arc": {"tasks": ["arc_easy"], "metric": "acc_norm", "validate": {"limit": 5}},
    },
}


def test_a_written_grid_is_the_grid(tmp_path: Path) -> None:
    """Reading what is written of a grid gives it again; paths beside the file are found, other sources stay."""
    (tmp_path / "target.jsonl").touch()
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(GRID))
    grid = read_grid(str(tmp_path / "grid.yaml"))
    assert grid.evaluations["target"].data == str(tmp_path / "target.jsonl")
    assert grid.config == ["job.yaml"]
    assert grid.budgets == [Budgets(0.1, 20), Budgets(None, None)]
    (tmp_path / "again.yaml").write_text(as_yaml(grid))
    assert read_grid(str(tmp_path / "again.yaml")) == grid


WRONG = [
    ({"method": {}}, "has no key 'method', perhaps methods; it knows config, methods, budgets, seeds, evaluations"),
    ({"methods": {"a": {"selct": {}}}}, r"methods\.a has no key 'selct', perhaps select; it knows select, fit,"),
    ({"methods": {"a": {"examples": "best"}}}, r"methods\.a\.examples does not take 'best'; it takes chosen, random"),
    ({"methods": {"a": {"select": 3}}}, r"methods\.a\.select does not take 3"),
    ({"methods": {1: {}}}, "methods has the name 1, which is not text"),
    ({"methods": {"base model": {}}}, "give it another name"),
    ({"methods": {"a": {"select": {"seed_everything": 3}}}}, r"methods\.a: select has seed_everything"),
    ({"methods": {"a": {"data": {}, "examples": "all"}}}, r"methods\.a: data and parameters choose both sides"),
    ({"methods": {"a": {"adapter": {}, "weights": "all"}}}, r"methods\.a: an adapter is trained in place of weights"),
    ({"budgets": [{"data": 1.5}]}, r"budgets\[0\]: data is 1\.5; give a fraction"),
    ({"budgets": [{"data": 0.1}, {"parameters": "x"}]}, r"budgets\[1\]\.parameters does not take 'x'"),
    ({"budgets": 0.1}, "budgets does not take"),
    ({"seeds": []}, "no seeds"),
    ({"seeds": [1, 1]}, "a seed twice"),
    ({"seeds": [0.5]}, r"seeds does not take \[0\.5\]; it takes a list of whole numbers"),
    ({"seeds": [-1]}, "seeds holds -1"),
    ({"evaluations": {"a": {}}}, r"evaluations\.a: .* without them it has no metrics"),
    ({"evaluations": {"a": {"tasks": "arc", "forgetting": True}}}, r"evaluations\.a: tasks have no use for forgetting"),
    ({"evaluations": {}}, "no evaluations; give at least one, or patterns: true"),
    ({"patterns": "some"}, "patterns does not take 'some'; it takes true or false"),
    ({"methods": {"a": {"select": {"model.model_name_or_path": "m"}}}}, r"methods\.a has model\.model_name_or_path"),
    (
        {"evaluations": {"a": {"data": "x", "group": "stability"}, "b": {"tasks": "y", "group": "stability"}}},
        "no mean over the acc of b and the loss of a",
    ),
]


@pytest.mark.parametrize(("change", "told"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_mistakes_are_told_with_their_place(change: dict[str, Any], told: str) -> None:
    """Each mistake ends in one sentence that says where it is."""
    with pytest.raises(UserError, match=told):
        grid_from({**GRID, **change}, Path())


def test_a_grid_without_evaluations(tmp_path: Path) -> None:
    """Asked for patterns alone it needs none, and its methods may name models; what is written of it is the grid."""
    methods = {name: {"select": {"model.model_name_or_path": name}} for name in ("one", "two")}
    given = {key: value for key, value in GRID.items() if key != "evaluations"}
    grid = grid_from({**given, "methods": methods, "patterns": True}, Path())
    (tmp_path / "grid.yaml").write_text(as_yaml(grid))
    assert read_grid(str(tmp_path / "grid.yaml")) == grid
    assert grid.evaluations == {}


@pytest.mark.parametrize("key", ["seeds", "methods", "config"])
def test_every_part_is_needed(key: str) -> None:
    """A grid without one of its parts is refused by the part's name."""
    with pytest.raises(UserError, match=f"has no {key}"):
        grid_from({name: value for name, value in GRID.items() if name != key}, Path())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("methods:\n  both: {}\n  both: {examples: all}\n", "line 3 gives 'both' a second time"),
        ("seeds: [0]\nseeds: [1]\n", "line 2 gives 'seeds' a second time"),
        ("seeds: [", "is not YAML"),
        ("", "empty or no mapping"),
    ],
)
def test_two_of_one_name_are_refused(text: str, told: str, tmp_path: Path) -> None:
    """Of two methods of one name YAML would keep the last without a word; text that is no mapping is refused too."""
    (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(UserError, match=told) as refused:
        read_grid(str(tmp_path / "grid.yaml"))
    assert "grid.yaml" in str(refused.value)
