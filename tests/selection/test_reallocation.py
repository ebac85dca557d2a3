"""Another choice from stored scores is the selection that a run with these budgets would have made."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import save_torch_state_dict

from dualsft import ParameterAllocator, load_selection
from dualsft.allocators import GlobalTopK, TopK
from dualsft.errors import UserError
from dualsft.runs.folder import RunFolder
from dualsft.selection import Selection, reallocation
from dualsft.selection.near_duplicates import NearDuplicates
from dualsft.selection.reallocation import reallocate
from dualsft.selection.summary import summary
from tests.world.damage import flipped, forget_checksums
from tests.world.data import LINES
from tests.world.faults import poisoned_by
from tests.world.jobs import SGD, Inputs, contents, select

OPTIONS: dict[str, Any] = {**SGD, "data_budget": 4, "parameter_budget": 777, "token_scores": True}
AS_BEFORE: dict[str, Any] = {
    "data_budget": 4,
    "parameter_budget": 777,
    "parameter_allocator": GlobalTopK(),
    "data_allocator": TopK(),
    "near_duplicates": NearDuplicates(),
}
CONFIG = "seed_everything: 3\n# é\n"


@pytest.fixture(scope="module")
def source(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A selection of 4 examples and 777 weights, with scores by token."""
    out = tmp_path_factory.mktemp("source") / "out"
    select(inputs, out, OPTIONS, seed=3, config=CONFIG)
    return out


def copy(source: Path, tmp_path: Path) -> Path:
    """A copy to tamper with."""
    return shutil.copytree(source, tmp_path / "copy")


def apart_from_its_own(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, the manifest's without what an allocation adds and without what a run cost."""
    found = contents(folder)
    manifest = json.loads(found["manifest.json"])
    manifest.pop("allocated_from", None)
    return {**found, "manifest.json": json.dumps(manifest).encode()}


CHOICES: dict[str, dict[str, Any]] = {
    "as it was": {},
    "counts": {"data_budget": 1, "parameter_budget": 12},
    "fractions": {"data_budget": 0.4, "parameter_budget": 0.25},
    "everything": {"data_budget": None, "parameter_budget": None},
    "signed": {"parameter_allocator": GlobalTopK("signed"), "parameter_budget": 0.5},
    "without near-duplicates": {"near_duplicates": NearDuplicates(0.9), "data_budget": None},
    "the lowest": {"parameter_allocator": GlobalTopK(reverse=True), "data_allocator": TopK(reverse=True)},
}


@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOICES)
def test_it_is_what_select_would_have_written(inputs: Inputs, source: Path, tmp_path: Path, choice: str) -> None:
    """Every file is that of a run with these budgets and allocators, byte for byte, and so is every key but its own."""
    changed = CHOICES[choice]
    select(inputs, tmp_path / "selected", {**OPTIONS, **changed}, seed=3, config=CONFIG)
    made = reallocate(source, tmp_path / "allocated", **{**AS_BEFORE, **changed}, config=CONFIG)
    assert apart_from_its_own(tmp_path / "allocated") == apart_from_its_own(tmp_path / "selected")
    assert made.folder == tmp_path / "allocated"
    assert (tmp_path / "allocated" / "token_scores.parquet").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("budget", [0.6, 5, None])
def test_budgets_count_what_select_counts(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: Any
) -> None:
    """A fraction is one of the examples with a response, those that were not finite included, as in a run."""
    monkeypatch.setattr("tests.world.jobs.SelectionModule", poisoned_by(gradient="4", loss="P"))
    select(inputs, tmp_path / "source", {**SGD, "data_budget": 1})
    select(inputs, tmp_path / "selected", {**SGD, "data_budget": budget})
    reallocate(tmp_path / "source", tmp_path / "out", **{**AS_BEFORE, "data_budget": budget, "parameter_budget": 0.1})
    assert apart_from_its_own(tmp_path / "out") == apart_from_its_own(tmp_path / "selected")
    with pytest.raises(UserError, match=r"model\.data_budget is 7, but only 6 examples have finite scores"):
        reallocate(tmp_path / "source", tmp_path / "more", **{**AS_BEFORE, "data_budget": 7})
    assert not (tmp_path / "more").exists()


def test_the_manifest_says_where_it_came_from_and_what_it_cost(source: Path, tmp_path: Path) -> None:
    """The source's folder as given and its manifest's hash; one phase, with the keys of any other, in the summary."""
    made = reallocate(source, tmp_path / "out", **{**AS_BEFORE, "data_budget": 2})
    digest = hashlib.sha256((source / "manifest.json").read_bytes()).hexdigest()
    assert made.manifest["allocated_from"] == {"folder": str(source), "manifest": digest}
    (phase,) = made.manifest["phases"]
    assert phase.keys() == load_selection(source).manifest["phases"][0].keys()
    assert (phase["name"], phase["examples"], phase["tokens"]) == ("allocation", 0, 0)
    assert phase["seconds"] > 0
    assert phase["peak_memory_bytes"] > 2**20
    told = summary(made)
    assert "2 of 10 selected (8 scored, 1 empty, 1 truncated)" in told
    assert "allocation" in told


def test_an_allocation_can_be_allocated_from(inputs: Inputs, source: Path, tmp_path: Path) -> None:
    """By way of another choice the result is the same, and it names the last step."""
    reallocate(source, tmp_path / "first", **{**AS_BEFORE, "data_budget": 1, "data_allocator": TopK(reverse=True)})
    reallocate(tmp_path / "first", tmp_path / "second", **AS_BEFORE, config=CONFIG)
    assert apart_from_its_own(tmp_path / "second") == apart_from_its_own(source)
    assert load_selection(tmp_path / "second").manifest["allocated_from"]["folder"] == str(tmp_path / "first")


ORDERS: dict[tuple[str, str], dict[str, Any]] = {
    ("parameters", "data"): {"data_budget": 2},
    ("data", "parameters"): {"parameter_budget": 900},
    ("parameters_then_data", "parameters"): {"parameter_budget": 900},
    ("data_then_parameters", "data"): {"data_budget": 2},
    ("parameters_then_data", ""): {"data_budget": None, "near_duplicates": NearDuplicates(0.9)},
    ("data_then_parameters", ""): {"parameter_budget": 900},
}


@pytest.mark.slow
@pytest.mark.parametrize(("order", "refused"), ORDERS)
def test_what_the_scores_rest_on_stays(inputs: Inputs, tmp_path: Path, order: str, refused: str) -> None:
    """A side by whose choice the other was scored cannot be changed; the other can, to what select would choose."""
    options = {**SGD, "order": order, "parameter_budget": 1000, "data_budget": 3}
    source = select(inputs, tmp_path / "source", options)
    budgets = source.manifest["budgets"]
    as_before = {**AS_BEFORE, "parameter_budget": budgets["parameters"], "data_budget": budgets["data"]}
    changed = ORDERS[order, refused]
    if refused:
        with pytest.raises(UserError, match=rf"order {order} .* choice of the {refused} is what"):
            reallocate(source.folder, tmp_path / "out", **{**as_before, **changed})
        assert not (tmp_path / "out").exists()
        return
    made = reallocate(source.folder, tmp_path / "out", **{**as_before, **changed})
    expected = select(inputs, tmp_path / "expected", {**options, **changed})
    for name in ("examples.parquet", "mask.safetensors", "parameter_scores.safetensors", "selected.jsonl"):
        assert (made.folder / name).read_bytes() == (expected.folder / name).read_bytes()


def test_near_duplicates_are_a_choice_of_data(inputs: Inputs, tmp_path: Path) -> None:
    """Where the weights were scored by the chosen examples, others cannot be collapsed later on."""
    source = select(inputs, tmp_path / "source", {**SGD, "order": "data_then_parameters", "data_budget": 3})
    as_before = {**AS_BEFORE, "parameter_budget": 0.1, "data_budget": 3}
    with pytest.raises(UserError, match="choice of the data is what"):
        reallocate(source.folder, tmp_path / "out", **{**as_before, "near_duplicates": NearDuplicates(0.9)})


def test_options_that_a_selection_is_older_than(source: Path, tmp_path: Path) -> None:
    """A manifest without them is one of a run with their defaults: nothing was collapsed, and all could be chosen."""
    older = copy(source, tmp_path)
    manifest = json.loads((older / "manifest.json").read_text(encoding="utf-8"))
    del manifest["near_duplicates"], manifest["trainable"], manifest["frozen"]
    del manifest["counts"]["examples"]["near_duplicates"]
    (older / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    made = reallocate(older, tmp_path / "out", **AS_BEFORE, config=CONFIG)
    assert apart_from_its_own(made.folder).keys() == apart_from_its_own(source).keys()
    assert made.example_ids == load_selection(source).example_ids
    assert "near-duplicates" not in summary(load_selection(older))


def test_rounds_cannot_be_changed_at_all(inputs: Inputs, tmp_path: Path) -> None:
    """After two rounds both sides rest on each other."""
    source = select(inputs, tmp_path / "source", {**SGD, "order": "parameters_then_data", "rounds": 2})
    with pytest.raises(UserError, match="rounds 2, where the choice of the parameters and the data is what"):
        reallocate(source.folder, tmp_path / "out", **{**AS_BEFORE, "data_budget": 2})


def test_what_it_does_not_know_is_kept(source: Path, tmp_path: Path) -> None:
    """Columns and keys of another version stay, in their places; only a control's mark goes."""
    other = copy(source, tmp_path)
    forget_checksums(other)
    table = pq.read_table(other / "examples.parquet").add_column(1, "round", pa.array(range(len(LINES)), pa.int32()))
    pq.write_table(table, other / "examples.parquet")
    manifest = json.loads((other / "manifest.json").read_text(encoding="utf-8"))
    manifest["counts"]["rounds"] = 2
    new = {"foreign": {"data": 0.5}, **manifest, "epochs": 2, "control": {"examples": "random"}}
    (other / "manifest.json").write_text(json.dumps(new), encoding="utf-8")
    made = reallocate(other, tmp_path / "out", **{**AS_BEFORE, "data_budget": 2})
    assert made.examples.drop_columns("selected").equals(table.drop_columns("selected"))
    assert made.examples.schema == table.schema
    assert (made.manifest["foreign"], made.manifest["epochs"]) == ({"data": 0.5}, 2)
    assert made.manifest["counts"]["rounds"] == 2
    assert "control" not in made.manifest


def test_linked_files_keep_their_checksums(source: Path, tmp_path: Path) -> None:
    """Those of the scores are the source's, and a bit that is flipped in them is noticed before anything is written."""
    made = reallocate(source, tmp_path / "out", **{**AS_BEFORE, "data_budget": 2})
    before, now = load_selection(source).about.checksums, made.about.checksums
    assert before
    assert now
    assert before.keys() == now.keys()
    assert before["parameter_scores.safetensors"] == now["parameter_scores.safetensors"]
    assert before["examples.parquet"] != now["examples.parquet"]
    other = copy(source, tmp_path)
    scores = other / "parameter_scores.safetensors"
    scores.write_bytes(flipped(scores.read_bytes(), scores.stat().st_size - 3))
    with pytest.raises(UserError, match=r"parameter_scores\.safetensors is damaged \(it holds other bytes than were"):
        reallocate(other, tmp_path / "again", **{**AS_BEFORE, "data_budget": 2})
    assert not (tmp_path / "again").exists()


def test_large_tables_are_written_as_fresh_ones_are(tmp_path: Path) -> None:
    """A table that is read in several chunks is written in the very pages of one that was made in memory."""
    rows = 300_000
    ids = pa.array(range(rows), pa.int64())
    tables = [
        pa.table({"example_id": ids, "selected": pa.array([i % step == 0 for i in range(rows)], pa.bool_())})
        for step in (2, 3)
    ]
    for name, table in zip("ab", tables, strict=True):
        pq.write_table(table, tmp_path / name)
    read = pq.read_table(tmp_path / "a")
    assert read["example_id"].num_chunks > 1
    pq.write_table(reallocation._with_selected(read, set(range(0, rows, 3))), tmp_path / "c")
    assert (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()


def test_scores_are_shared_where_that_is_possible(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Score files are hard links; where there are none, copies with the same bytes."""
    names = {"parameter_scores.safetensors", "token_scores.parquet"}
    linked = reallocate(source, tmp_path / "linked", **AS_BEFORE).folder
    assert {path.name for path in source.iterdir() if path.samefile(linked / path.name)} == names
    monkeypatch.setattr(os, "link", refuse(OSError("no links here")))
    copied = reallocate(source, tmp_path / "copied", **AS_BEFORE).folder
    assert not any(path.samefile(copied / path.name) for path in source.iterdir())
    assert all((copied / name).read_bytes() == (source / name).read_bytes() for name in names)


def test_replacing_an_allocation_leaves_the_source_alone(source: Path, tmp_path: Path) -> None:
    """Overwriting a folder that shares score files deletes its names for them, not the files."""
    before = contents(source)
    reallocate(source, tmp_path / "out", **AS_BEFORE)
    with pytest.raises(UserError, match="already holds files"):
        reallocate(source, tmp_path / "out", **AS_BEFORE)
    made = reallocate(source, tmp_path / "out", **{**AS_BEFORE, "data_budget": 1}, overwrite=True)
    assert len(made.example_ids) == 1
    assert contents(source) == before


def test_scores_in_several_files(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large scores lie in several files with an index; all of them come along, and one that is missing is noticed."""
    sharded = copy(source, tmp_path)
    scores = load_selection(source).parameter_scores()
    (sharded / "parameter_scores.safetensors").unlink()
    save_torch_state_dict(
        scores, sharded, filename_pattern="parameter_scores{suffix}.safetensors", max_shard_size=20_000
    )
    made = reallocate(sharded, tmp_path / "out", **AS_BEFORE)
    assert len(made.score_files) > 3
    assert (made.folder / "mask.safetensors").read_bytes() == (source / "mask.safetensors").read_bytes()
    assert {p.name for p in made.score_files} == {p.name for p in load_selection(sharded).score_files}
    next(sharded.glob("parameter_scores-*")).unlink()
    with pytest.raises(UserError, match=r"has lost parameter scores: [\d,]+ of [\d,]+ are there"):
        reallocate(sharded, tmp_path / "again", **AS_BEFORE)


def test_options_of_the_scoring_are_no_choice(source: Path, tmp_path: Path) -> None:
    """What the scores rest on cannot be given."""
    with pytest.raises(TypeError, match="warmup decides no choice; the options are parameter_budget, data_budget, "):
        reallocate(source, tmp_path / "out", warmup=None)


def test_data_that_has_moved(inputs: Inputs, source: Path, tmp_path: Path) -> None:
    """Where the records are gone, the message says what to give; what is given then is what the manifest names."""
    other = copy(source, tmp_path)
    manifest = json.loads((other / "manifest.json").read_text(encoding="utf-8"))
    manifest["data"]["train"]["path"] = gone = str(tmp_path / "gone.jsonl")
    (other / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    for given in (None, gone):
        with pytest.raises(UserError, match=r"gone\.jsonl does not exist.*say with --data\.train where it lies now"):
            reallocate(other, tmp_path / "out", **AS_BEFORE, train=given)
    moved = shutil.copy(inputs.train, tmp_path / "moved.jsonl")
    made = reallocate(other, tmp_path / "out", **AS_BEFORE, train=str(moved))
    assert made.manifest["data"]["train"]["path"] == str(moved)
    assert (made.folder / "selected.jsonl").read_bytes() == (source / "selected.jsonl").read_bytes()


def test_other_data_is_refused(inputs: Inputs, source: Path, tmp_path: Path) -> None:
    """Records that the scores were not made of are not chosen from."""
    with pytest.raises(UserError, match=r"was made for other data: 10 rows against 3"):
        reallocate(source, tmp_path / "out", **AS_BEFORE, train=inputs.validation)
    with pytest.raises(UserError, match=r"nowhere\.jsonl does not exist: give a \.jsonl"):
        reallocate(source, tmp_path / "out", **AS_BEFORE, train="nowhere.jsonl")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("place", [".", "inside", "../out"])
def test_the_selection_itself_is_never_written_to(source: Path, place: str, overwrite: bool) -> None:
    """Neither over it nor into it, however it is spelt."""
    before = contents(source)
    with pytest.raises(UserError, match=r"--output_dir .* lies in .*; choose another folder"):
        reallocate(source, source / place, **AS_BEFORE, overwrite=overwrite)
    assert contents(source) == before


def test_what_it_reads_is_not_replaced(inputs: Inputs, source: Path, tmp_path: Path) -> None:
    """An output folder that holds the selection or the records is refused even with overwrite."""
    first = reallocate(source, tmp_path / "run", **AS_BEFORE).folder
    shutil.copytree(first, tmp_path / "run" / "selection")
    with pytest.raises(UserError, match=r"--overwrite would delete .*selection, which this run reads"):
        reallocate(tmp_path / "run" / "selection", tmp_path / "run", **AS_BEFORE, overwrite=True)
    shutil.copy(inputs.train, first / "selection" / "pool.jsonl")
    records = str(first / "selection" / "pool.jsonl")
    with pytest.raises(UserError, match=r"--overwrite would delete .*pool\.jsonl, which this run reads"):
        reallocate(source, first, **AS_BEFORE, train=records, overwrite=True)


class Stingy(ParameterAllocator):
    """Chooses nothing."""

    def allocate(self, scores: Any, budget: int) -> Any:
        return {name: score != score for name, score in scores.items()}


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no budget": ({"data_budget": 0}, r"model\.data_budget is 0"),
    "fraction above one": ({"parameter_budget": 1.5}, r"model\.parameter_budget is 1\.5"),
    "count above the pool": ({"data_budget": 9}, r"model\.data_budget is 9, but there are only 8"),
    "count above the weights": ({"parameter_budget": 10**9}, r"model\.parameter_budget is 1,000,000,000, but"),
    "allocator": ({"parameter_allocator": Stingy()}, r"Stingy chose 0 weights"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_leaves_no_trace(source: Path, tmp_path: Path, mistake: str) -> None:
    """A mistake is named, and neither a new folder nor a changed one is left; nor is one that was to be replaced."""
    changed, words = MISTAKES[mistake]
    with pytest.raises(UserError, match=words):
        reallocate(source, tmp_path / "out", **{**AS_BEFORE, **changed})
    assert not (tmp_path / "out").exists()
    reallocate(source, tmp_path / "out", **AS_BEFORE)
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=words):
        reallocate(source, tmp_path / "out", **{**AS_BEFORE, **changed}, overwrite=True)
    assert contents(tmp_path / "out") == before


def refuse(error: BaseException) -> Callable[..., None]:
    """A function that raises."""

    def raise_it(*_: Any, **__: Any) -> None:
        raise error

    return raise_it


@pytest.mark.parametrize("step", [(reallocation, "write_selection"), (reallocation, "publish"), (RunFolder, "staging")])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_broken_run_leaves_nothing_behind(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: tuple[Any, str], error: BaseException
) -> None:
    """Whatever stops it while it writes, the folder is free for the next try."""
    with monkeypatch.context() as broken:
        broken.setattr(*step, refuse(error))
        with pytest.raises(type(error)):
            reallocate(source, tmp_path / "out", **AS_BEFORE)
    assert not (tmp_path / "out").exists()
    reallocate(source, tmp_path / "out", **AS_BEFORE)


@pytest.mark.parametrize("name", ["parameter_scores.safetensors", "examples.parquet", "manifest.json"])
def test_damaged_parts_are_named(source: Path, tmp_path: Path, name: str) -> None:
    """A file that cannot be read is an error that names it."""
    damaged = copy(source, tmp_path)
    (damaged / name).write_bytes((damaged / name).read_bytes()[:20])
    with pytest.raises(UserError, match=rf"{name} (is damaged|cannot be read)"):
        reallocate(damaged, tmp_path / "out", **AS_BEFORE)
    assert not (tmp_path / "out").exists()


def test_the_source_is_left_as_it_was(source: Path, tmp_path: Path) -> None:
    """Not a byte of the selection that is allocated from changes."""
    before = contents(source)
    made: Selection = reallocate(source, tmp_path / "out", **{**AS_BEFORE, "data_budget": 1})
    assert made.example_ids != load_selection(source).example_ids
    assert contents(source) == before
