"""The contract of a selection directory, read with nothing but json, pyarrow, safetensors and numpy."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from dualsft import load_selection
from dualsft.data.records import read_records
from dualsft.data.selected import selected_ids
from dualsft.errors import UserError
from dualsft.finetune import MaskedFinetuneModule
from dualsft.models.loading import load_model
from dualsft.selection import Selection
from dualsft.selection.mask import write_masks
from tests.references import assert_same_gradients, slow_scores
from tests.world.damage import flipped, forget_checksums
from tests.world.data import LINES, OK, STATUS
from tests.world.jobs import ADAM, SGD, Inputs, contents, select, write_inputs

CONFIG = "seed_everything: 3\n# é\n"


@pytest.fixture(scope="module")
def folder(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A selection at the base model, first order, with plain gradients: 4 examples and 777 weights."""
    out = tmp_path_factory.mktemp("selection") / "out"
    select(inputs, out, {**SGD, "data_budget": 4, "parameter_budget": 777, "step_size": 0.5}, seed=3, config=CONFIG)
    return out


@pytest.fixture(scope="module")
def manifest(folder: Path) -> dict[str, Any]:
    """The manifest."""
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return found


def columns(folder: Path) -> dict[str, list[Any]]:
    """The table of examples."""
    found: dict[str, list[Any]] = pq.read_table(folder / "examples.parquet").to_pydict()
    return found


def unpacked_mask(folder: Path) -> dict[str, np.ndarray]:
    """The mask by numpy: bits, least significant first, over the flat parameter; the metadata has shapes."""
    with safe_open(folder / "mask.safetensors", framework="np") as stored:
        shapes = json.loads(stored.metadata()["shapes"])
        packed = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    assert packed.keys() == shapes.keys()
    mask = {}
    for name, data in packed.items():
        size = int(np.prod(shapes[name]))
        assert data.dtype == np.uint8
        assert data.shape == (-(-size // 8),)
        bits = (data[np.arange(size) // 8] >> (np.arange(size) % 8)) & 1
        assert int(data.astype(int).sum()) == sum(int(b) << (j % 8) for j, b in enumerate(bits)), "bits beyond the end"
        mask[name] = bits.reshape(shapes[name]).astype(bool)
    return mask


def test_the_files_are_these(folder: Path) -> None:
    """A finished selection has the promised files and no others: no state, no pickle."""
    assert sorted(path.name for path in folder.rglob("*")) == [
        "config.yaml",
        "diagnostics.json",
        "examples.parquet",
        "manifest.json",
        "mask.safetensors",
        "parameter_scores.safetensors",
        "parameters.parquet",
        "selected.jsonl",
    ]
    assert not any(path.read_bytes().startswith((b"\x80", b"PK")) for path in folder.iterdir())


def test_examples_table(folder: Path) -> None:
    """One row per record, in order; a score where, and only where, the record could be scored; supervised tokens."""
    schema = pq.read_schema(folder / "examples.parquet")
    assert schema.names == ["example_id", "score", "num_tokens", "status", "selected"]
    assert schema.types == [pa.int64(), pa.float64(), pa.int64(), pa.string(), pa.bool_()]
    table = columns(folder)
    assert table["example_id"] == list(range(len(LINES)))
    assert table["status"] == STATUS
    assert [i for i, score in enumerate(table["score"]) if score is not None] == OK
    assert [i for i, tokens in enumerate(table["num_tokens"]) if tokens > 0] == OK


def test_num_tokens_are_supervised_tokens(folder: Path, inputs: Inputs) -> None:
    """num_tokens counts the labels that training would learn from."""
    counted = {i: sum(label != -100 for label in labels) for i, (_, labels) in inputs.examples("train").items()}
    assert {i: n for i, n in enumerate(columns(folder)["num_tokens"]) if n} == counted


def test_the_best_examples_are_selected(folder: Path) -> None:
    """Exactly the budget's number of examples, those of the highest scores, ties to the earlier row."""
    table = columns(folder)
    ranked = sorted(OK, key=lambda i: (-table["score"][i], i))
    assert [i for i, chosen in enumerate(table["selected"]) if chosen] == sorted(ranked[:4])


def test_selected_records_are_verbatim(folder: Path) -> None:
    """selected.jsonl holds the selected lines byte for byte, in source order."""
    chosen = [line for line, selected in zip(LINES, columns(folder)["selected"], strict=True) if selected]
    assert (folder / "selected.jsonl").read_bytes() == "".join(f"{line}\n" for line in chosen).encode()


def test_scores_equal_the_loop_over_examples(folder: Path, inputs: Inputs) -> None:
    """Both score vectors are those of a float64 loop of autograd at the base model, with u = (η/n) v."""
    rows, weights = slow_scores(inputs, inputs.model, 0.5)
    scores = columns(folder)["score"]
    assert {i: scores[i] for i in OK} == pytest.approx(rows, rel=1e-4, abs=1e-6 * max(map(abs, rows.values())))
    stored = load_file(folder / "parameter_scores.safetensors")
    assert all(score.dtype == np.float32 for score in stored.values())
    assert_same_gradients({name: torch.from_numpy(score) for name, score in stored.items()}, weights, 2e-5)


def test_mask_holds_the_largest_scores(folder: Path, inputs: Inputs) -> None:
    """Exactly as many weights as the budget says, those of the largest |φ_j|; names and shapes are the model's."""
    stored, mask = load_file(folder / "parameter_scores.safetensors"), unpacked_mask(folder)
    shapes = {name: tuple(p.shape) for name, p in load_model(inputs.model).named_parameters()}
    assert {name: score.shape for name, score in stored.items()} == shapes
    assert {name: chosen.shape for name, chosen in mask.items()} == shapes
    assert sum(int(chosen.sum()) for chosen in mask.values()) == 777
    taken = np.concatenate([np.abs(stored[name][mask[name]]) for name in mask])
    left = np.concatenate([np.abs(stored[name][~mask[name]]) for name in mask])
    assert taken.min() >= left.max()


def test_manifest_tells_what_was_done(manifest: dict[str, Any], inputs: Inputs) -> None:
    """Inputs by fingerprint, scorer, η, budgets, counts and coverage."""
    weights = sum(p.numel() for p in load_model(inputs.model).parameters())
    assert manifest["schema_version"] == 1
    assert manifest["model"]["num_parameters"] == weights
    for fingerprint in (manifest["model"], manifest["tokenizer"], manifest["data"]["train"]):
        assert len(bytes.fromhex(fingerprint["fingerprint"])) == 32
    assert manifest["scorer"]["class_path"].endswith("FirstOrder")
    assert (manifest["step_size"], manifest["preconditioner"], manifest["seed"]) == (0.5, "none", 3)
    assert manifest["budgets"] == {"parameters": 777, "data": 4}
    assert manifest["counts"] == {
        "examples": {"selected": 4, "scored": 8, "near_duplicates": 0, "rows": 10},
        "parameters": {"selected": 777, "scored": weights},
    }
    assert manifest["data"]["train"]["status"] == {"ok": 8, "empty": 1, "truncated": 1}
    assert manifest["coverage"] == 1.0
    assert manifest["versions"]["torch"] == torch.__version__


def test_sum_identity_is_reported(folder: Path, manifest: dict[str, Any]) -> None:
    """Both sides in the manifest are the sums of the stored scores, and they agree."""
    identity = manifest["sum_identity"]
    scores = [s for s in columns(folder)["score"] if s is not None]
    weights = load_file(folder / "parameter_scores.safetensors")
    assert identity["row_sum"] == pytest.approx(sum(scores), rel=1e-12)
    assert identity["column_sum"] == pytest.approx(
        sum(float(w.sum(dtype=np.float64)) for w in weights.values()), rel=1e-12
    )
    assert identity["row_sum"] == pytest.approx(identity["column_sum"], rel=1e-3)
    assert identity["relative_difference"] <= identity["tolerance"]


def test_phases_tell_what_they_cost(manifest: dict[str, Any]) -> None:
    """Each phase has a name, examples, supervised tokens, seconds, their ratio, and peak memory."""
    phases = manifest["phases"]
    assert [phase["name"] for phase in phases] == ["validation gradient", "scores"]
    assert [phase["examples"] for phase in phases] == [2, 8]
    totals = [manifest["data"][which]["supervised_tokens"] for which in ("validation", "train")]
    assert [phase["tokens"] for phase in phases] == totals
    for phase in phases:
        assert set(phase) == {"name", "examples", "tokens", "seconds", "tokens_per_second", "peak_memory_bytes"}
        assert phase["seconds"] > 0
        assert phase["tokens_per_second"] == phase["tokens"] / phase["seconds"]
        assert phase["peak_memory_bytes"] > 2**20


def test_config_is_kept(folder: Path) -> None:
    """config.yaml is what was given."""
    assert (folder / "config.yaml").read_text(encoding="utf-8") == CONFIG


def test_load_selection_reads_all_of_it(folder: Path) -> None:
    """The reader gives the manifest, the table, the ids, the records, the mask and the scores that the files hold."""
    selection, table = load_selection(folder), columns(folder)
    assert selection.manifest["schema_version"] == 1
    assert selection.examples.to_pydict() == table
    assert selection.example_ids == [i for i, chosen in enumerate(table["selected"]) if chosen]
    assert selection.records == [json.loads(LINES[i]) for i in selection.example_ids]
    mask = selection.mask()
    assert {name: chosen.numpy().tolist() for name, chosen in mask.items()} == {
        name: chosen.tolist() for name, chosen in unpacked_mask(folder).items()
    }
    assert {n: s.numpy().tolist() for n, s in selection.parameter_scores().items()} == {
        n: s.tolist() for n, s in load_file(folder / "parameter_scores.safetensors").items()
    }


def test_records_with_unusual_line_separators(inputs: Inputs, tmp_path: Path) -> None:
    """Lines end at LF alone: a record that holds U+2028 and U+0085 comes back whole."""
    selection = select(inputs, tmp_path / "out", {**SGD, "data_budget": None})
    assert selection.records == [json.loads(LINES[i]) for i in OK]


def test_null_budgets_take_everything(inputs: Inputs, tmp_path: Path) -> None:
    """Without budgets all scored examples and all weights are selected."""
    out = tmp_path / "out"
    select(inputs, out, {**SGD, "data_budget": None, "parameter_budget": None})
    assert [i for i, chosen in enumerate(columns(out)["selected"]) if chosen] == OK
    assert all(chosen.all() for chosen in unpacked_mask(out).values())


@pytest.mark.parametrize("options", [SGD, ADAM], ids=["none", "adam"])
def test_the_same_seed_gives_the_same_bytes(inputs: Inputs, tmp_path: Path, options: dict[str, Any]) -> None:
    """Two runs differ in nothing but what they cost, whatever random numbers were drawn before."""
    select(inputs, tmp_path / "a", options, seed=5)
    torch.manual_seed(1234)
    select(inputs, tmp_path / "b", options, seed=5)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_dropout_in_the_warm_up_goes_by_the_seed(tmp_path: Path) -> None:
    """Of a model with dropout, too, the bytes are decided by the seed, not by what was drawn before."""
    inputs = write_inputs(tmp_path)
    path = Path(inputs.model) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention_dropout": 0.5}))
    found = []
    for run in range(2):
        torch.manual_seed(run)
        found.append(contents(select(inputs, tmp_path / f"out{run}", ADAM).folder))
    assert found[0] == found[1]


def test_another_seed_warms_up_on_other_examples(inputs: Inputs, tmp_path: Path) -> None:
    """The seed decides the warm-up, hence the scores."""
    scores = [columns(select(inputs, tmp_path / str(seed), ADAM, seed=seed).folder)["score"][0] for seed in range(3)]
    assert len(set(scores)) == 3


def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(folder, tmp_path / "copy")


def test_no_folder_is_no_selection(tmp_path: Path) -> None:
    """A folder that is not there is an error that tells how to make one."""
    with pytest.raises(UserError, match="no such selection directory; `dualsft select --output_dir"):
        load_selection(tmp_path / "nothing")


def test_a_selection_without_manifest_is_unfinished(folder: Path, tmp_path: Path) -> None:
    """Only the manifest makes a selection."""
    damaged = copy(folder, tmp_path)
    (damaged / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"not a finished selection: it has no manifest.json"):
        load_selection(damaged)


@pytest.mark.parametrize("text", ["{", "\ud800", "", '{"coverage": NaN}', '{"coverage": 1e999}', "[" * 100_000])
def test_a_damaged_manifest_is_said_to_be(folder: Path, tmp_path: Path, text: str) -> None:
    """What is not JSON, or not text, is damaged."""
    damaged = copy(folder, tmp_path)
    (damaged / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        load_selection(damaged)


@pytest.mark.parametrize("content", [{"schema_version": 2}, {}, []])
def test_other_schema_versions_are_refused(folder: Path, tmp_path: Path, content: Any) -> None:
    """A manifest of another version, or of another program, is not read on."""
    damaged = copy(folder, tmp_path)
    (damaged / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="this dualsft reads 1"):
        load_selection(damaged)


@pytest.mark.parametrize("name", ["examples.parquet", "mask.safetensors", "selected.jsonl"])
def test_a_lost_part_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    """A selection without one of its parts is an error that names the part."""
    damaged = copy(folder, tmp_path)
    (damaged / name).unlink()
    with pytest.raises(UserError, match=f"has lost {name}"):
        load_selection(damaged)


@pytest.mark.parametrize(
    ("name", "part", "kept"),
    [
        ("examples.parquet", "examples", slice(-3)),
        ("selected.jsonl", "records", slice(-3)),
        ("selected.jsonl", "records", slice(0)),  # empty, but still JSON lines
    ],
)
def test_a_damaged_part_is_named(folder: Path, tmp_path: Path, name: str, part: str, kept: slice) -> None:
    """A table or a record that was cut short is refused with its file, in Python too."""
    damaged = copy(folder, tmp_path)
    whole = (damaged / name).read_bytes()
    (damaged / name).write_bytes(whole[kept])
    with pytest.raises(UserError, match=rf"{name} is damaged"):
        getattr(load_selection(damaged), part)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_scores_that_are_no_numbers_are_refused(folder: Path, tmp_path: Path, number: float) -> None:
    """A null stands for no score; what is not finite no run has written, and no allocator can compare."""
    damaged = copy(folder, tmp_path)
    table = pq.read_table(damaged / "examples.parquet")
    scores = table["score"].to_pylist()
    place = table.schema.get_field_index("score")
    scores[next(i for i, score in enumerate(scores) if score is not None)] = number
    changed = table.set_column(place, table.schema.field(place), pa.array(scores, pa.float64()))
    pq.write_table(changed, damaged / "examples.parquet")
    forget_checksums(damaged)
    with pytest.raises(UserError, match="its column score holds numbers that are not finite"):
        _ = load_selection(damaged).examples


READERS: dict[str, Callable[[Selection], Any]] = {
    "examples.parquet": lambda s: s.examples,
    "mask.safetensors": lambda s: s.mask(),
    "parameter_scores.safetensors": lambda s: s.parameter_scores(),
    "selected.jsonl": lambda s: s.records,
}


@pytest.mark.parametrize("name", READERS)
def test_a_flipped_bit_is_noticed_wherever_it_is(folder: Path, tmp_path: Path, name: str) -> None:
    """By the checksum in the manifest, and by the file's name; a selection of an earlier version has none."""
    shutil.copytree(folder, tmp_path / "s")
    path = tmp_path / "s" / name
    whole = path.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 50)):
        path.write_bytes(flipped(whole, place))
        with pytest.raises(UserError) as raised:
            READERS[name](load_selection(tmp_path / "s"))
        assert (
            str(raised.value)
            == f"{path} is damaged (it holds other bytes than were written); make the selection again."
        )
    path.write_bytes(whole)
    forget_checksums(tmp_path / "s")
    READERS[name](load_selection(tmp_path / "s"))


def test_training_notices_a_flipped_bit_of_the_examples(folder: Path, inputs: Inputs, tmp_path: Path) -> None:
    """It reads the table by itself."""
    shutil.copytree(folder, tmp_path / "s")
    path = tmp_path / "s" / "examples.parquet"
    path.write_bytes(flipped(path.read_bytes(), 30))
    with pytest.raises(UserError, match=r"examples\.parquet cannot be read \(it holds other bytes than were written\)"):
        selected_ids(tmp_path / "s", read_records(inputs.train))


def flip_a_bit_of_the_mask(folder: Path) -> None:
    """The last byte of the file is one of the mask's."""
    forget_checksums(folder)
    path = folder / "mask.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))


def edit_examples(folder: Path, edit: Callable[[pa.Table], pa.Table]) -> None:
    """Change the table of examples."""
    forget_checksums(folder)
    path = folder / "examples.parquet"
    pq.write_table(edit(pq.read_table(path)), path)


def with_column(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    """The table with other values in a column."""
    return table.set_column(table.schema.get_field_index(name), name, pa.array(values))


EDITS: dict[str, Callable[[pa.Table], pa.Table]] = {
    "one more selected": lambda t: with_column(t, "selected", [True] * len(t)),
    "a row less": lambda t: t.slice(1),
    "no status": lambda t: t.drop_columns("status"),
    "numbers for true and false": lambda t: with_column(t, "selected", [1] * len(t)),
    "text for numbers": lambda t: with_column(t, "score", ["x"] * len(t)),
    "rows in another order": lambda t: t.take(list(reversed(range(len(t))))),
    "a row without tokens": lambda t: with_column(t, "num_tokens", [None, *t["num_tokens"].to_pylist()[1:]]),
    "a row without status": lambda t: with_column(t, "status", [None, *t["status"].to_pylist()[1:]]),
    "nothing known of a row": lambda t: with_column(t, "selected", [None, *t["selected"].to_pylist()[1:]]),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_table_that_is_not_what_the_manifest_tells_is_refused(folder: Path, tmp_path: Path, edit: str) -> None:
    """A flipped bit or an editor's hand would otherwise train on other examples."""
    shutil.copytree(folder, tmp_path / "s")
    edit_examples(tmp_path / "s", EDITS[edit])
    with pytest.raises(UserError, match=r"examples\.parquet is damaged: .*; make the selection again"):
        _ = load_selection(tmp_path / "s").examples


def test_a_mask_that_is_not_what_the_manifest_tells_is_refused(folder: Path, inputs: Inputs, tmp_path: Path) -> None:
    """A flipped bit would otherwise train another weight, and a shape that was edited end in a traceback."""
    shutil.copytree(folder, tmp_path / "s")
    flip_a_bit_of_the_mask(tmp_path / "s")
    module = MaskedFinetuneModule(inputs.model, str(tmp_path / "s"))
    with pytest.raises(UserError, match=r"it chooses 77[68] weights, the manifest tells of 777"):
        module.configure_model()
    stored = unpacked_mask(folder)
    turned = {name: torch.from_numpy(part.reshape(part.shape[::-1])) for name, part in stored.items()}
    write_masks(tmp_path / "s" / "mask.safetensors", turned)
    with pytest.raises(UserError, match=r"mask\.safetensors is damaged \(.* has shape .*\); make the selection again"):
        MaskedFinetuneModule(inputs.model, str(tmp_path / "s")).configure_model()
