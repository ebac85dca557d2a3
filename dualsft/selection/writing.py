"""Writes a selection directory: its parts into a staged folder, then all of them into place, the manifest last."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import Tensor

from dualsft.data.selected import SCHEMA_VERSION
from dualsft.runs import folder as run_folder
from dualsft.selection.artifact import (
    EXAMPLE_SCHEMA,
    EXAMPLES,
    MANIFEST,
    MASK,
    SELECTED,
    SKETCHES,
    TOKEN_SCHEMA,
    TOKENS,
    WEIGHT_SCORES,
)
from dualsft.selection.diagnostics import (
    Basis,
    RowSources,
    WeightFigures,
    diagnose,
    weight_figures,
    write_diagnostics,
)
from dualsft.selection.kept_scores import keep_scores
from dualsft.selection.mask import write_masks
from dualsft.selection.near_duplicates import DUPLICATE_OF
from dualsft.selection.settings import KeptScores
from dualsft.sharding.files import full_tensor_files, read_full_tensors
from dualsft.storage.checksums import file_checksum
from dualsft.storage.writing import writing_to

_ALL_OF_TOKENS = TOKEN_SCHEMA.append(pa.field("supervised", pa.list_(pa.bool_())))  # the last is not in older files


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
    sources: RowSources | None = None,
    basis: Basis | None = None,
    kept: KeptScores = "full",
    weights: WeightFigures | None = None,
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
        sources: The sources of the rows, if there are several.
        basis: What the scores rest on, for the diagnostics.
        kept: How the scores of weights are kept.
        weights: The figures of these scores, where they are not there.
    """
    with writing_to(folder):
        known = {path.name for path in folder.iterdir()} & (manifest.get("checksums") or {}).keys()
        _write_scores(folder, token_scores, sketches)
        table = _write_choice(folder, examples, mask, selected_lines)
        scores = parameter_scores or read_full_tensors(full_tensor_files(folder, WEIGHT_SCORES))
        figures = weights or weight_figures(mask, scores)
        write_diagnostics(folder, *diagnose(table, figures, sources, basis or Basis()))
        keep_scores(folder, scores, kept)
        checksums = {
            p.name: manifest["checksums"][p.name] if p.name in known else file_checksum(p)
            for p in sorted(folder.iterdir())
        }
        (folder / "config.yaml").write_text(config, encoding="utf-8")
        whole = {"schema_version": SCHEMA_VERSION, **manifest, "checksums": checksums}
        text = json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False)
        (folder / MANIFEST).write_text(f"{text}\n", encoding="utf-8")


def _write_scores(
    folder: Path,
    token_scores: Mapping[str, Sequence[Any]] | None,
    sketches: Mapping[int, Tensor] | None,
) -> None:
    if sketches is not None:
        ids = sorted(sketches)
        stored = {"example_id": torch.tensor(ids), "sketch": torch.stack([sketches[i].float() for i in ids])}
        save_file(stored, folder / SKETCHES)
    if token_scores is not None:
        pq.write_table(pa.table(dict(token_scores), schema=_ALL_OF_TOKENS), folder / TOKENS)


def _write_choice(
    folder: Path,
    examples: Mapping[str, Sequence[Any]] | pa.Table,
    mask: Mapping[str, Tensor],
    selected_lines: Sequence[str],
) -> pa.Table:
    if not isinstance(examples, pa.Table):
        others = [name for name in examples if name not in EXAMPLE_SCHEMA.names]
        kinds = [pa.field(name, pa.int64() if name == DUPLICATE_OF else pa.float64()) for name in others]
        examples = pa.table(dict(examples), schema=pa.schema([*EXAMPLE_SCHEMA, *kinds]))
    pq.write_table(examples, folder / EXAMPLES)
    write_masks(folder / MASK, mask)
    (folder / SELECTED).write_text("".join(f"{line}\n" for line in selected_lines), encoding="utf-8", newline="\n")
    return examples


def publish(staged: Path, folder: Path) -> None:
    """Move a staged selection into its folder, the manifest last: without it nothing there counts as a selection."""
    run_folder.publish(staged, folder, last=MANIFEST)
