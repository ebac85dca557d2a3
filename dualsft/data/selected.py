"""What training reads of a selection: the chosen ids, checked against the pool they were chosen from."""

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dualsft.data.records import Records
from dualsft.errors import UserError

SCHEMA_VERSION = 1


def selected_ids(path: str | Path, records: Records) -> list[int]:
    """Reads the selected example ids, ascending, of a selection directory.

    Args:
        path: A directory that holds ``manifest.json`` and ``examples.parquet``.
        records: The pool that is about to be trained on.

    Raises:
        UserError: If the selection is unfinished, unreadable or was made for other data.
    """
    folder = Path(path)
    fingerprint = _train_fingerprint(folder)
    table = _examples(folder)
    if fingerprint != records.fingerprint:
        raise UserError(
            f"The selection in {folder} was made for other data: {table.num_rows} rows against {len(records)} in "
            "data.train, or rows that differ; give the data it was made from or select again."
        )
    return sorted(table.filter(table["selected"])["example_id"].to_pylist())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The JSON object in a selection's ``manifest.json``, of the schema version that is read here.

    Raises:
        UserError: if there is no such file, it is damaged, or another version wrote it.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        raise UserError(
            f"{folder} is not a finished selection: it has no {path.name}; run `dualsft select` again with --resume."
        )
    try:
        text = path.read_text(encoding="utf-8")
        manifest = json.loads(text, parse_float=_finite, parse_constant=_finite)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); make the selection again.") from error
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{folder} has schema version {version}, this dualsft reads {SCHEMA_VERSION}; use the version that wrote "
            "it or select again."
        )
    return manifest


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not finite")
    return number


def _train_fingerprint(folder: Path) -> str:
    try:
        return str(read_manifest(folder)["data"]["train"]["fingerprint"])
    except (LookupError, TypeError) as error:
        raise UserError(f"{folder}/manifest.json does not tell which data the selection was made for.") from error


def _examples(folder: Path) -> pa.Table:
    try:
        return pq.read_table(folder / "examples.parquet", columns=["example_id", "selected"])
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{folder}/examples.parquet cannot be read: {error}") from error
