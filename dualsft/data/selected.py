"""The ids that a finished selection chose, checked against the pool they were chosen from."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dualsft.data.records import Records
from dualsft.errors import UserError


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


def _train_fingerprint(folder: Path) -> str:
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return str(manifest["data"]["train"]["fingerprint"])
    except FileNotFoundError as error:
        raise UserError(f"{folder} is not a finished selection: it has no manifest.json.") from error
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{folder}/manifest.json does not tell which data the selection was made for.") from error


def _examples(folder: Path) -> pa.Table:
    try:
        return pq.read_table(folder / "examples.parquet", columns=["example_id", "selected"])
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{folder}/examples.parquet cannot be read: {error}") from error
