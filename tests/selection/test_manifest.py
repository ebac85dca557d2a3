"""A manifest is read as it was written, and whatever is wrong with one is said in a sentence."""

import json
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from dualsft import MaskedFinetuneModule
from dualsft.allocators import GlobalTopK, TopK
from dualsft.data.selected import read_manifest
from dualsft.errors import UserError
from dualsft.scorers import FirstOrder
from dualsft.selection import Warmup, load_selection
from dualsft.selection.json_values import Part, describe_part
from dualsft.selection.manifest import Manifest, open_manifest
from dualsft.selection.reallocation import reallocate
from dualsft.selection.settings import SelectionSettings, describe_settings, options
from dualsft.selection.writing import write_selection
from tests.world.jobs import SGD, Inputs, select

EXAMPLE = Path(__file__).with_name("manifest.json")
"""Of a tiny selection."""
MACHINES = ("model", "tokenizer", "data", "sum_identity", "prediction", "versions", "phases", "directory", "checksums")
"""Keys with paths, costs or versions, which differ between machines."""
SECTIONS = ("model", "data", "counts", "sum_identity", "prediction", "rounds", "phases")


@pytest.fixture
def example() -> dict[str, Any]:
    """Its content."""
    content: dict[str, Any] = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    return content


def store(folder: Path, content: Any) -> Path:
    """A folder with a manifest."""
    (folder / "manifest.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_a_manifest_is_the_sections_written_down(example: dict[str, Any]) -> None:
    """What the dataclasses hold is what the file holds, key by key and in its order."""
    stored, typed = open_manifest(EXAMPLE.parent)
    assert stored == example
    for name in SECTIONS:
        value = getattr(typed, name)
        plain = [asdict(one) for one in value] if isinstance(value, list) else asdict(value)
        assert json.dumps(plain) == json.dumps(example[name])
    for name in ("scoring_checkpoint", "tokenizer", "seed", "versions", "coverage", "scoring_batch_tokens"):
        assert getattr(typed, name) == example[name]


def test_options_are_read_back(example: dict[str, Any]) -> None:
    """Settings that are made of what a manifest holds are described by the same bytes."""
    _, typed = open_manifest(EXAMPLE.parent)
    parts = {"scorer": FirstOrder(), "parameter_allocator": GlobalTopK(), "data_allocator": TopK()}
    assert {name: typed.settings[name] for name in parts} == {n: Part(**describe_part(p)) for n, p in parts.items()}
    described = describe_settings(SelectionSettings(**{**typed.settings, **parts}))
    assert json.dumps(described) == json.dumps({key: example[key] for key in example if key in described})
    assert typed.settings["warmup"] == Warmup(fraction=0.0)


def test_the_example_is_what_is_written_today(inputs: Inputs, tmp_path: Path, example: dict[str, Any]) -> None:
    """The same keys in the same order, at every depth, and the same bytes wherever no path or cost is told."""
    options = {**SGD, "data_budget": 4, "parameter_budget": 777, "token_scores": True}
    found = select(inputs, tmp_path / "out", options, seed=3).manifest
    assert [path for path, _ in walk(found)] == [path for path, _ in walk(example)]
    for manifest in (found, example):
        for key in MACHINES:
            del manifest[key]
    assert json.dumps(found) == json.dumps(example)


def test_a_manifest_is_written_as_it_was_read(tmp_path: Path) -> None:
    """Byte for byte, with the keys of another program."""
    text = EXAMPLE.read_text(encoding="utf-8").replace('{\n  "schema', '{\n  "foreign": "é",\n  "schema', 1)
    (tmp_path / "manifest.json").write_text(text, encoding="utf-8")
    stored, _ = open_manifest(tmp_path)
    (tmp_path / "again").mkdir()
    empty: Any = {"example_id": [], "score": [], "num_tokens": [], "status": [], "selected": []}
    write_selection(
        tmp_path / "again",
        manifest=stored,
        examples=empty,
        parameter_scores=None,
        mask={},
        selected_lines=[],
        config="",
    )
    moved = {"schema_version": 1, **json.loads(text)}
    again = (tmp_path / "again" / "manifest.json").read_text(encoding="utf-8")
    new = json.loads(again)["checksums"]
    assert [*new] == [
        "diagnostics.json",
        "examples.parquet",
        "mask.safetensors",
        "parameters.parquet",
        "selected.jsonl",
    ]
    first, _, _ = text.partition('"checksums"')
    assert again.partition('"checksums"')[0] == first.replace(
        '{\n  "foreign": "é",\n  "schema_version": 1,\n', '{\n  "schema_version": 1,\n  "foreign": "é",\n'
    )
    assert {**json.loads(again), "checksums": moved["checksums"]} == moved


def walk(value: Any, key: str = "") -> Iterator[tuple[str, tuple[str | int, ...]]]:
    """Each key at every depth, as it is told and as it is found."""

    def below(value: Any, told: str, path: tuple[str | int, ...]) -> Iterator[tuple[str, tuple[str | int, ...]]]:
        items = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
        for name, one in items:
            here = f"{told}[{name}]" if isinstance(value, list) else f"{told}.{name}".lstrip(".")
            yield here, (*path, name)
            yield from below(one, here, (*path, name))

    return below(value, key, ())


def parent(content: Any, path: tuple[str | int, ...]) -> Any:
    """What holds the last key of a path."""
    for name in path[:-1]:
        content = content[name]
    return content


LATER = ("normalize", "path", "near_duplicates", "trainable", "frozen", "parameter_scores", "stability")
DEFAULTED = (*LATER, "path_walked", "directory", "counts.examples.near_duplicates")
NESTED = (
    "configuration",
    "special_tokens",
    "checksums",
    "warmup.",
    "prior.",
    "near_duplicates.",
    "path.",
    "data.format.",
    "versions.",
    "tokenizer.",
)


def test_a_missing_key_is_named(tmp_path: Path, example: dict[str, Any]) -> None:
    """One sentence with file and key, at every depth, but for what came later or has a default of its own."""
    for told, path in walk(example):
        optional = told in ("schema_version", *DEFAULTED) or told.startswith(NESTED) or isinstance(path[-1], int)
        if optional or ".options." in told or ".status." in told:
            continue
        content = deepcopy(example)
        del parent(content, path)[path[-1]]
        with pytest.raises(UserError) as raised:
            open_manifest(store(tmp_path, content))
        due = f"{tmp_path / 'manifest.json'}: {told} is missing; make the selection again."
        assert str(raised.value) == due


def test_a_wrong_type_is_named(tmp_path: Path, example: dict[str, Any]) -> None:
    """One sentence with file and key, at every depth, whatever stands there instead."""
    strange: list[Any] = [{"strange": None}]
    for told, path in walk(example):
        if told == "schema_version" or ".options." in told or told.startswith("configuration."):
            continue
        content = deepcopy(example)
        parent(content, path)[path[-1]] = strange
        with pytest.raises(UserError) as raised:
            open_manifest(store(tmp_path, content))
        assert str(raised.value).startswith(f"{tmp_path / 'manifest.json'}: {told}")
        assert str(raised.value).endswith("; make the selection again.")
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("counts", "examples", "selected"), "many", 'counts.examples.selected is "many", an integer is due'),
        (("counts", "examples", "selected"), True, "counts.examples.selected is true, an integer is due"),
        (("counts", "examples", "selected"), 1.5, "counts.examples.selected is 1.5, an integer is due"),
        (("counts", "examples"), None, "counts.examples is null, an object is due"),
        (("budgets", "data"), "all", 'budgets.data is "all", an integer or a number or null is due'),
        (("combination",), "sum", 'combination is "sum", "mean" or "max" or "min" is due'),
        (("phases", 0, "seconds"), "1", 'phases[0].seconds is "1", a number is due'),
        (("coverage",), 10**400, f"coverage is 1{'0' * 39}…, a number is due"),
        (("data", "validation", "rows"), "2", 'data.validation.rows is "2", an integer is due'),
        (("data", "validation"), {"a": {"rows": 2}}, "data.validation.a.path is missing"),
        (("frozen",), ["a" * 60], ""),
        (("frozen",), {"a": "b" * 60}, f'frozen is {{"a": "{"b" * 33}…, a list or null is due'),
        (("near_duplicates", "threshold"), 7, "model.near_duplicates.threshold is 7.0; give a similarity"),
        (("data", "format", "format"), "csv", 'data.format.format is "csv", "auto" or'),
    ],
)
def test_what_is_said(
    tmp_path: Path, example: dict[str, Any], path: tuple[str | int, ...], value: Any, told: str
) -> None:
    """The value, and what is due."""
    parent(example, path)[path[-1]] = value
    if not told:
        assert open_manifest(store(tmp_path, example))[1].settings["frozen"] == value
        return
    with pytest.raises(UserError) as raised:
        open_manifest(store(tmp_path, example))
    assert str(raised.value).startswith(f"{tmp_path / 'manifest.json'}: {told}")


def test_named_validation_sets(tmp_path: Path, example: dict[str, Any]) -> None:
    """Of several sets each is there by its name, whatever that is."""
    one = example["data"]["validation"]
    example["data"]["validation"] = {"fingerprint": one, "b": one}
    _, typed = open_manifest(store(tmp_path, example))
    assert isinstance(typed.data.validation, dict)
    assert {name: asdict(of) for name, of in typed.data.validation.items()} == {"fingerprint": one, "b": one}


def test_later_options_are_added_to_the_json(tmp_path: Path, example: dict[str, Any]) -> None:
    """Whoever reads the keys of an older selection finds the defaults."""
    later = [option.key for option in options() if option.later]
    old = {key: value for key, value in example.items() if key not in later}
    stored, typed = open_manifest(store(tmp_path, old))
    assert stored == example
    assert typed == open_manifest(EXAMPLE.parent)[1]
    assert later == list(LATER)


def test_no_manifest_at_all(tmp_path: Path) -> None:
    """A folder without one, and a folder by its name."""
    for _ in range(2):
        with pytest.raises(UserError, match=r"is not a finished selection: it has no manifest\.json"):
            read_manifest(tmp_path)
        (tmp_path / "manifest.json").mkdir(exist_ok=True)


def test_a_selection_has_both(inputs: Inputs, tmp_path: Path) -> None:
    """Plain JSON by key and types by attribute."""
    made = select(inputs, tmp_path / "out", SGD)
    assert isinstance(made.about, Manifest)
    assert made.manifest["counts"]["examples"]["selected"] == made.about.counts.examples.selected
    assert load_selection(made.folder) == made
    assert json.loads(json.dumps(made.manifest)) == made.manifest


def test_every_reader_says_the_same(inputs: Inputs, tmp_path: Path) -> None:
    """Allocating, fine-tuning and resuming refuse a damaged manifest in the same sentence."""
    folder = select(inputs, tmp_path / "out", SGD).folder
    content = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    content["counts"]["examples"]["selected"] = "many"
    store(folder, content)
    due = rf'{folder / "manifest.json"}: counts\.examples\.selected is "many", an integer is due; make the selection'
    with pytest.raises(UserError, match=due):
        select(inputs, folder, SGD, resume=True)
    with pytest.raises(UserError, match=due):
        reallocate(folder, tmp_path / "allocated")
    with pytest.raises(UserError, match=due):
        MaskedFinetuneModule(inputs.model, selection=str(folder))
