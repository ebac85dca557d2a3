"""The selection directory as it is read: scores, choices, diagnostics, and a manifest that marks it as complete."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dualsft.errors import UserError
from dualsft.selection.diagnostics import (
    DIAGNOSTICS,
    PARAMETERS,
    Basis,
    Diagnostics,
    diagnose,
    weight_figures,
)
from dualsft.selection.diagnostics.parameters import SCHEMA as PARAMETER_SCHEMA
from dualsft.selection.json_values import Mismatch
from dualsft.selection.manifest import Manifest, open_manifest
from dualsft.selection.mask import refusing_damage, stored_masks
from dualsft.storage.checksums import check_file
from dualsft.storage.paths import expanded

MANIFEST, EXAMPLES, MASK, SELECTED = "manifest.json", "examples.parquet", "mask.safetensors", "selected.jsonl"

EXAMPLE_SCHEMA = pa.schema(
    [
        ("example_id", pa.int64()),
        ("score", pa.float64()),
        ("num_tokens", pa.int64()),
        ("status", pa.string()),
        ("selected", pa.bool_()),
    ]
)
TOKENS, WEIGHT_SCORES, SKETCHES = "token_scores.parquet", "parameter_scores", "example_sketches.safetensors"
TOKEN_SCHEMA = pa.schema(
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
        table, counts = _read_table(self._intact(EXAMPLES)), self.about.counts.examples
        selected = _check_examples(self.folder / EXAMPLES, table)
        if (len(table), selected) != (counts.rows, counts.selected):
            raise UserError(
                f"{self.folder / EXAMPLES} is damaged: it has {selected:,} of {len(table):,} rows selected, the "
                f"manifest tells of {counts.selected:,} of {counts.rows:,}; make the selection again."
            )
        return table

    @cached_property
    def token_scores(self) -> pa.Table | None:
        """One row per scored example, if scores by token were asked for: example_id, token_id and score (lists)."""
        path = self.folder / TOKENS
        if not path.is_file():
            return None
        table = _read_table(self._intact(TOKENS))
        _check_columns(path, table, TOKEN_SCHEMA)
        return table

    def token_scores_of(self, examples: Iterable[int]) -> pa.Table | None:
        """The rows of `token_scores` of these examples alone, so that memory does not grow with the pool."""
        path = self.folder / TOKENS
        if not path.is_file():
            return None
        with refusing_damage(path):
            table = pq.read_table(self._intact(TOKENS), filters=[("example_id", "in", list(examples))])
        _check_columns(path, table, TOKEN_SCHEMA)
        return table

    @cached_property
    def diagnostics(self) -> Diagnostics:
        """What the choice looks like; computed from the scores where an earlier release has written none."""
        path = self.folder / DIAGNOSTICS
        if not path.is_file():
            return self._diagnosed[0]
        try:
            return Diagnostics.from_json(self._intact(DIAGNOSTICS).read_text(encoding="utf-8"))
        except (Mismatch, OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} is damaged ({error}); make the selection again.") from error

    @property
    def basis(self) -> Basis:
        """What the scores rest on, as far as it was written down: an earlier release has not."""
        return self.diagnostics.basis if (self.folder / DIAGNOSTICS).is_file() else Basis()

    @cached_property
    def parameters(self) -> pa.Table:
        """One row per parameter, by name: layer, kind, size, how many are selected, and figures of the scores."""
        path = self.folder / PARAMETERS
        if not path.is_file():
            return self._diagnosed[1]
        table = _read_table(self._intact(PARAMETERS))
        _check_columns(path, table, PARAMETER_SCHEMA)
        if any(table[name].null_count for name in ("name", "size", "selected")):
            raise UserError(f"{path} is damaged: it lacks names or counts; make the selection again.")
        return table

    @cached_property
    def _diagnosed(self) -> tuple[Diagnostics, pa.Table]:
        weights = weight_figures(self.stored_masks(), self.parameter_scores())
        return diagnose(self.examples, weights, None, Basis())

    @property
    def example_ids(self) -> list[int]:
        """The selected row numbers of ``data.train``, ascending."""
        ids: list[int] = self.examples.filter(self.examples["selected"])["example_id"].to_pylist()
        return ids

    @property
    def records(self) -> list[dict[str, Any]]:
        """The selected records, in source order."""
        path = self._intact(SELECTED)
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
        """Parameter name -> φ_j, float32, of the parameter's shape; rounded to bfloat16 where it is kept so.

        Raises:
            UserError: if the selection keeps none, or a file is damaged.
        """
        if self.about.settings["parameter_scores"] == "none":
            raise UserError(
                f"{self.folder} was made with model.parameter_scores none and keeps no scores of weights; select again "
                "with full or bfloat16."
            )
        scores: dict[str, Tensor] = {}
        for path in sorted(self.folder.glob(f"{WEIGHT_SCORES}*.safetensors")):
            with refusing_damage(path), safe_open(self._intact(path.name), framework="pt") as stored:
                scores |= {name: stored.get_tensor(name).float() for name in stored.keys()}  # noqa: SIM118
        return scores

    def sketches(self) -> dict[int, Tensor]:
        """Example id -> its gradient's sketch, float32; empty unless the data allocator needed it."""
        path = self.folder / SKETCHES
        if not path.is_file():
            return {}
        with refusing_damage(path):
            stored = load_file(self._intact(SKETCHES))
            sketches = dict(zip(stored["example_id"].tolist(), stored["sketch"], strict=True))
        scored = np.flatnonzero(self.examples["score"].is_valid().to_numpy())
        if len(lost := np.setdiff1d(scored, stored["example_id"].numpy())):
            raise UserError(f"{path} is damaged: it has no sketch of example {lost[0]}; make the selection again.")
        return sketches

    @property
    def score_files(self) -> list[Path]:
        """The files that hold scores and nothing of the choice: those of weights, and of tokens and sketches if any."""
        return sorted(path for name in (f"{WEIGHT_SCORES}*", TOKENS, SKETCHES) for path in self.folder.glob(name))

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
    _check_columns(path, table, EXAMPLE_SCHEMA)
    lost = sum(table[name].null_count for name in ("num_tokens", "status", "selected"))
    if lost or not np.array_equal(table["example_id"].to_numpy(), np.arange(len(table))):
        raise UserError(f"{path} is damaged: its rows are not those of a pool, in order; make the selection again.")
    for name in (field.name for field in table.schema if field.type == pa.float64()):
        odd = pc.invert(pc.is_finite(table[name].drop_null()))
        if pc.any(odd).as_py():
            raise UserError(
                f"{path} is damaged: its column {name} holds numbers that are not finite; make the selection again."
            )
    return int(table["selected"].to_numpy().sum())


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
    if lost := [name for name in (EXAMPLES, MASK, SELECTED) if not (path / name).is_file()]:
        raise UserError(f"{path} has lost {', '.join(lost)}; make the selection again.")
    return Selection(path, manifest, about)
