"""The selection directory: scores, choices and a manifest, which is published last and marks it as complete."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dualsft.data.module import InstructionDataModule
from dualsft.data.selected import SCHEMA_VERSION
from dualsft.errors import UserError
from dualsft.matrix.sketches import SKETCH
from dualsft.runs import folder as run_folder
from dualsft.selection.manifest import Manifest, open_manifest
from dualsft.selection.mask import refusing_damage, stored_masks, write_masks
from dualsft.selection.order import Chosen, ScoresBothSides
from dualsft.storage.checksums import check_file, file_checksum
from dualsft.storage.paths import expanded
from dualsft.storage.writing import writing_to

_MANIFEST, _EXAMPLES, MASK, _SELECTED = "manifest.json", "examples.parquet", "mask.safetensors", "selected.jsonl"

_SCHEMA = pa.schema(
    [
        ("example_id", pa.int64()),
        ("score", pa.float64()),
        ("num_tokens", pa.int64()),
        ("status", pa.string()),
        ("selected", pa.bool_()),
    ]
)
_TOKENS, WEIGHT_SCORES, _SKETCHES = "token_scores.parquet", "parameter_scores", "example_sketches.safetensors"
_TOKEN_SCHEMA = pa.schema(
    [("example_id", pa.int64()), ("token_id", pa.list_(pa.int32())), ("score", pa.list_(pa.float64()))]
)


@dataclass(frozen=True)
class Selection:
    """A finished selection on disk; its parts are read when they are asked for, and refused if they are damaged.

    Attributes:
        folder: The selection directory.
        manifest: ``manifest.json`` as it is.
        about: The manifest as dataclasses.
    """

    folder: Path
    manifest: dict[str, Any]
    about: Manifest

    @cached_property
    def examples(self) -> pa.Table:
        """One row per record of ``data.train``: example_id, score, num_tokens, status, selected.

        Several validation sets add a column score_NAME each; ``score`` combines these.
        """
        table, counts = _read_table(self._intact(_EXAMPLES)), self.about.counts.examples
        selected = _check_examples(self.folder / _EXAMPLES, table)
        if (len(table), selected) != (counts.rows, counts.selected):
            raise UserError(
                f"{self.folder / _EXAMPLES} is damaged: it has {selected:,} of {len(table):,} rows selected, the "
                f"manifest tells of {counts.selected:,} of {counts.rows:,}; make the selection again."
            )
        return table

    @cached_property
    def token_scores(self) -> pa.Table | None:
        """One row per scored example, if scores by token were asked for: example_id, token_id and score (lists)."""
        path = self.folder / _TOKENS
        if not path.is_file():
            return None
        table = _read_table(self._intact(_TOKENS))
        _check_columns(path, table, _TOKEN_SCHEMA)
        return table

    @property
    def example_ids(self) -> list[int]:
        """The selected row numbers of ``data.train``, ascending."""
        ids: list[int] = self.examples.filter(self.examples["selected"])["example_id"].to_pylist()
        return ids

    @property
    def records(self) -> list[dict[str, Any]]:
        """The selected records, in source order."""
        path = self._intact(_SELECTED)
        with refusing_damage(path), open(path, encoding="utf-8", newline="\n") as lines:
            records = [json.loads(line) for line in lines]
        if (found := len(records)) != (due := self.about.counts.examples.selected):
            raise UserError(
                f"{path} is damaged: it has {found:,} records, the manifest tells of {due:,}; make the selection again."
            )
        return records

    def mask(self) -> dict[str, Tensor]:
        """Parameter name -> bool, of the parameter's shape."""
        return dict(self.stored_masks())

    def stored_masks(self) -> Mapping[str, Tensor]:
        """The masks, each unpacked when it is read."""
        return stored_masks(self._intact(MASK))

    def parameter_scores(self) -> dict[str, Tensor]:
        """Parameter name -> φ_j, float32, of the parameter's shape."""
        scores: dict[str, Tensor] = {}
        for path in sorted(self.folder.glob(f"{WEIGHT_SCORES}*.safetensors")):
            with refusing_damage(path), safe_open(self._intact(path.name), framework="pt") as stored:
                scores |= {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        return scores

    def sketches(self) -> dict[int, Tensor]:
        """Example id -> its gradient's sketch, float32; empty unless the data allocator needed it."""
        path = self.folder / _SKETCHES
        if not path.is_file():
            return {}
        with refusing_damage(path):
            stored = load_file(self._intact(_SKETCHES))
            sketches = dict(zip(stored["example_id"].tolist(), stored["sketch"], strict=True))
        numbers, scores = (self.examples[name].to_pylist() for name in ("example_id", "score"))
        if lost := [i for i, score in zip(numbers, scores, strict=True) if score is not None and i not in sketches]:
            raise UserError(f"{path} is damaged: it has no sketch of example {lost[0]}; make the selection again.")
        return sketches

    @property
    def score_files(self) -> list[Path]:
        """The files that hold scores and nothing of the choice: those of weights, and of tokens and sketches if any."""
        return sorted(path for name in (f"{WEIGHT_SCORES}*", _TOKENS, _SKETCHES) for path in self.folder.glob(name))

    def _intact(self, name: str) -> Path:
        """The path of a file, for reading; refuses one that holds other bytes than were written."""
        path = self.folder / name
        with refusing_damage(path):
            check_file(path, (self.about.checksums or {}).get(name))
        return path


def _read_table(path: Path) -> pa.Table:
    with refusing_damage(path):
        return pq.read_table(path)


def _check_columns(path: Path, table: pa.Table, schema: pa.Schema) -> None:
    for field in schema:
        if table.column_names.count(field.name) != 1 or table.schema.field(field.name).type != field.type:
            raise UserError(
                f"{path} is damaged: it has no column {field.name} of {field.type}; make the selection again."
            )


def _check_examples(path: Path, table: pa.Table) -> int:
    """How many examples are selected; refuses a table without its columns, rows of a pool or finite numbers."""
    _check_columns(path, table, _SCHEMA)
    lost = sum(table[name].null_count for name in ("num_tokens", "status", "selected"))
    if lost or table["example_id"].to_pylist() != list(range(len(table))):
        raise UserError(f"{path} is damaged: its rows are not those of a pool, in order; make the selection again.")
    for name in (field.name for field in table.schema if field.type == pa.float64()):
        odd = pc.invert(pc.is_finite(table[name].drop_null()))
        if pc.any(odd).as_py():
            raise UserError(
                f"{path} is damaged: its column {name} holds numbers that are not finite; make the selection again."
            )
    return sum(table["selected"].to_pylist())


def load_selection(folder: str | os.PathLike[str]) -> Selection:
    """Open a selection directory.

    Raises:
        UserError: if there is none, it was not finished, it has lost a part, another version wrote it, or its manifest
            is damaged.
    """
    path = Path(expanded(os.fspath(folder)))
    if not path.is_dir():
        raise UserError(f"{path}: no such selection directory; `dualsft select --output_dir {path}` makes one.")
    manifest, about = open_manifest(path)
    if lost := [name for name in (_EXAMPLES, MASK, _SELECTED) if not (path / name).is_file()]:
        raise UserError(f"{path} has lost {', '.join(lost)}; make the selection again.")
    return Selection(path, manifest, about)


def write_selection(
    folder: Path,
    *,
    manifest: Mapping[str, Any],
    examples: Mapping[str, Sequence[Any]] | pa.Table,
    mask: Mapping[str, Tensor],
    selected_lines: Sequence[str],
    config: str,
    parameter_scores: Mapping[str, Tensor] | None = None,
    token_scores: Mapping[str, Sequence[Any]] | None = None,
    sketches: Mapping[int, Tensor] | None = None,
) -> None:
    """Write the parts of a selection into an empty folder; see `publish` for the step that makes it visible.

    Args:
        folder: A folder that is empty, or holds the files of those scores that are not given.
        manifest: All but the schema version and the checksums; those of the files that are there are kept, if it has
            them.
        examples: Column name -> one value per record of ``data.train``; columns beside the usual ones hold scores.
        mask: Parameter name -> which entries are chosen, of the parameter's shape.
        selected_lines: The selected records as they stand in the source, in source order.
        config: YAML that replays the run.
        parameter_scores: Parameter name -> φ_j, float32, of the parameter's shape.
        token_scores: Column name -> one value per scored example.
        sketches: Example id -> its gradient's sketch.
    """
    with writing_to(folder):
        kept = {path.name for path in folder.iterdir()} & (manifest.get("checksums") or {}).keys()
        _write_scores(folder, parameter_scores, token_scores, sketches)
        _write_choice(folder, examples, mask, selected_lines)
        checksums = {
            p.name: manifest["checksums"][p.name] if p.name in kept else file_checksum(p)
            for p in sorted(folder.iterdir())
        }
        (folder / "config.yaml").write_text(config, encoding="utf-8")
        whole = {"schema_version": SCHEMA_VERSION, **manifest, "checksums": checksums}
        text = json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False)
        (folder / _MANIFEST).write_text(f"{text}\n", encoding="utf-8")


def _write_scores(
    folder: Path,
    parameter_scores: Mapping[str, Tensor] | None,
    token_scores: Mapping[str, Sequence[Any]] | None,
    sketches: Mapping[int, Tensor] | None,
) -> None:
    if sketches is not None:
        ids = sorted(sketches)
        stored = {"example_id": torch.tensor(ids), "sketch": torch.stack([sketches[i].float() for i in ids])}
        save_file(stored, folder / _SKETCHES)
    if token_scores is not None:
        pq.write_table(pa.table(dict(token_scores), schema=_TOKEN_SCHEMA), folder / _TOKENS)
    if parameter_scores is not None:
        pattern = f"{WEIGHT_SCORES}{{suffix}}.safetensors"
        save_torch_state_dict(dict(sorted(parameter_scores.items())), folder, filename_pattern=pattern)


def _write_choice(
    folder: Path,
    examples: Mapping[str, Sequence[Any]] | pa.Table,
    mask: Mapping[str, Tensor],
    selected_lines: Sequence[str],
) -> None:
    if not isinstance(examples, pa.Table):
        sets = [pa.field(name, pa.float64()) for name in examples if name not in _SCHEMA.names]
        examples = pa.table(dict(examples), schema=pa.schema([*_SCHEMA, *sets]))
    pq.write_table(examples, folder / _EXAMPLES)
    write_masks(folder / MASK, mask)
    (folder / _SELECTED).write_text("".join(f"{line}\n" for line in selected_lines), encoding="utf-8", newline="\n")


def publish(staged: Path, folder: Path) -> None:
    """Move a staged selection into its folder, the manifest last: without it nothing there counts as a selection."""
    run_folder.publish(staged, folder, last=_MANIFEST)


def example_table(data: InstructionDataModule, chosen: Chosen, scoring: ScoresBothSides) -> dict[str, list[Any]]:
    """The columns of ``examples.parquet``: name -> one value per record of ``data.train``.

    Each named validation set has a column for its scores, and each measured statistic, except sketches, has one.
    """
    pool, found = data.train_examples, chosen.example_scores
    ids = range(len(pool.status))
    sets = found.by_set if data.named_validation else {}
    numbers = {name: values for name, values in scoring.measured.items() if name != SKETCH}
    return {
        "example_id": list(ids),
        "score": [found.scores.get(i) for i in ids],
        "num_tokens": [int(n) for n in pool.num_tokens],
        "status": ["nonfinite" if i in scoring.nonfinite else status for i, status in enumerate(pool.status)],
        "selected": [i in chosen.examples for i in ids],
        **{f"score_{name}": [scores.get(i) for i in ids] for name, scores in sets.items()},
        **{name: [float(values[i]) if i in found.scores else None for i in ids] for name, values in numbers.items()},
    }


def token_table(data: InstructionDataModule, chosen: Chosen) -> dict[str, list[Any]]:
    """The columns of ``token_scores.parquet``: name -> one value per scored example."""
    tokens, pool = chosen.example_scores.tokens, data.train_examples.dataset
    ids = sorted(tokens)
    return {
        "example_id": ids,
        "token_id": [list(pool[i]["input_ids"]) for i in ids],
        "score": [tokens[i].tolist() for i in ids],
    }
