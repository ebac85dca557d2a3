"""The part of a selection that training reads: the chosen ids, checked against the pool they were chosen from."""

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from dualsft.errors import UserError
from dualsft.storage.checksums import check_file
from dualsft.storage.paths import expanded

if TYPE_CHECKING:
    from dualsft.data.records import Records

SCHEMA_VERSION = 1
_COLUMNS = pa.schema([pa.field("example_id", pa.int64(), False), pa.field("selected", pa.bool_(), False)])


def is_selection(path: str) -> bool:
    """Whether a path is the folder of a selection."""
    folder = Path(expanded(path))
    return all((folder / name).is_file() for name in ("manifest.json", "examples.parquet", "selected.jsonl"))


def made_from(path: str) -> tuple[Any, str]:
    """The sources that a selection was made from, as they were given, and the split that was read.

    Raises:
        UserError: If its manifest does not tell.
    """
    folder = Path(expanded(path))
    try:
        train = read_manifest(folder)["data"]["train"]
        return train["path"], str(train["split"])
    except (LookupError, TypeError) as error:
        raise UserError(f"{folder}/manifest.json does not tell which data the selection was made for.") from error


def selected_ids(path: str | Path, records: "Records") -> list[int]:
    """Reads the selected example ids, ascending, of a selection directory.

    Raises:
        UserError: If the selection is unfinished, unreadable or was made for other data than ``records``.
    """
    folder = Path(expanded(os.fspath(path)))
    try:
        manifest = read_manifest(folder)
        fingerprint = manifest["data"]["train"]["fingerprint"]
        checksum = (manifest.get("checksums") or {}).get("examples.parquet")
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}/manifest.json does not tell which data the selection was made for.") from error
    try:
        check_file(folder / "examples.parquet", checksum)
        table = pq.read_table(folder / "examples.parquet", columns=["example_id", "selected"]).cast(_COLUMNS)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{folder}/examples.parquet cannot be read ({error}); make the selection again.") from error
    if fingerprint != records.fingerprint:
        raise UserError(
            f"The selection in {folder} was made for other data: {table.num_rows} rows against {len(records)} in "
            "data.train, or rows that differ; give the data it was made from or select again."
        )
    ids = sorted(table.filter(table["selected"])["example_id"].to_pylist())
    if ids and not 0 <= ids[0] <= ids[-1] < len(records):
        raise UserError(f"{folder}/examples.parquet selects other rows than there are; make the selection again.")
    return ids


def read_manifest(folder: Path) -> dict[str, Any]:
    """The JSON object in a selection's ``manifest.json``; refuses one that is damaged or of another schema version."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise UserError(
            f"{folder} is not a finished selection: it has no {path.name}; run `dualsft select` again with --resume."
        )
    try:
        text = path.read_text(encoding="utf-8")
        manifest = json.loads(text, parse_float=_finite, parse_constant=_finite)
        json.dumps(manifest, ensure_ascii=False).encode()  # a lone surrogate, as an escape, could not be written again
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); make the selection again.") from error
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if type(version) is not int or version != SCHEMA_VERSION:
        raise UserError(
            f"{folder} has schema version {version}, this dualsft reads {SCHEMA_VERSION}; use the version that wrote "
            "it or select again."
        )
    return manifest


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not finite")
    return number
