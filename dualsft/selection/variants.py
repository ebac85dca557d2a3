"""Variants of a selection: other examples and other weights on the same base model and pool, for a fit to train."""

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dualsft.data.records import Records
from dualsft.selection.artifact import Selection, load_selection
from dualsft.selection.manifest import recounted
from dualsft.selection.writing import publish, write_selection


def write_variant(
    selection: Selection,
    records: Records,
    folder: Path,
    *,
    examples: Collection[int],
    mask: Mapping[str, Tensor],
    about: Mapping[str, Any],
) -> Selection:
    """Write a selection that differs from another only in its choices, without the scores of the weights.

    Args:
        selection: The selection that it is a variant of.
        records: The records of the pool.
        folder: A folder that does not exist yet, or is empty.
        examples: The examples that it chooses.
        mask: The weights that it chooses.
        about: What is said of it under ``control`` in its manifest.
    """
    chosen = set(examples)
    table = selection.examples
    staged = folder / ".unfinished"
    staged.mkdir(parents=True)
    kept = {key: value for key, value in selection.manifest.items() if key != "checksums"}
    write_selection(
        staged,
        manifest={
            **kept,
            "counts": recounted(selection.manifest, mask, selected=len(chosen)),
            "control": dict(about),
        },
        examples={**table.to_pydict(), "selected": [i in chosen for i in table["example_id"].to_pylist()]},
        mask=mask,
        selected_lines=[records.line(i) for i in sorted(chosen)],
        config=(selection.folder / "config.yaml").read_text(encoding="utf-8"),
    )
    publish(staged, folder)
    shutil.rmtree(staged)
    return load_selection(folder)
