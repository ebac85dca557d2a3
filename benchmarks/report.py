"""How long the report on a large pool takes, and how large its page is.

    python benchmarks/report.py runs/selection                    a pool of 200,000 rows
    python benchmarks/report.py runs/selection --rows 20000

The pool is that of a finished selection, whose rows are repeated with scores that differ by chance; where it kept its
scores by token, so does the large one. Prints the seconds of `dualsft report`, imports included, the peak memory, and
the size of the page.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from dualsft.data.records import Records, read_records
from dualsft.selection import Selection, load_selection
from dualsft.selection.diagnostics import RowSources
from dualsft.selection.writing import write_selection

_MEASURED = "import resource, sys; from dualsft.cli import run; run(sys.argv[1:]); "
_MEASURED += (
    "used = resource.getrusage(resource.RUSAGE_SELF); print(used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20)"
)


def write_pool(selection: Selection, path: Path, rows: int) -> Records:
    """Write the records again and again, each time with another number, and read them."""
    train = selection.about.data.train
    records = list(read_records(train.path, train.split))
    with open(path, "w", encoding="utf-8") as stream:
        for row in range(rows):
            stream.write(json.dumps({**records[row % len(records)], "number": row}, ensure_ascii=False) + "\n")
    return read_records(str(path))


def enlarge(selection: Selection, folder: Path, records: Records, path: Path) -> None:
    """Write the selection of a tenth of the larger pool."""
    table, rows = selection.examples, len(records)
    source = np.arange(rows) % len(table)
    noise = np.exp(np.random.default_rng(0).normal(0.0, 0.3, rows))
    score = table["score"].to_numpy()[source] * noise
    chosen = np.argsort(-np.nan_to_num(score, nan=-np.inf), kind="stable")[: rows // 10]
    selected = np.zeros(rows, bool)
    selected[chosen] = True
    manifest: dict[str, Any] = {key: of for key, of in selection.manifest.items() if key != "checksums"}
    train = {**manifest["data"]["train"], "path": str(path), "fingerprint": records.fingerprint, "rows": rows}
    manifest["data"] = {**manifest["data"], "train": train}
    counts = {"selected": len(chosen), "scored": int(np.isfinite(score).sum()), "near_duplicates": 0, "rows": rows}
    manifest["counts"] = {**manifest["counts"], "examples": counts}
    folder.mkdir()
    write_selection(
        folder,
        manifest=manifest,
        examples={
            "example_id": range(rows),
            "score": [None if np.isnan(value) else float(value) for value in score],
            "num_tokens": table["num_tokens"].to_numpy()[source],
            "status": table["status"].to_numpy(zero_copy_only=False)[source],
            "selected": selected,
        },
        mask=selection.mask(),
        selected_lines=[records.line(int(row)) for row in sorted(chosen)],
        config="",
        parameter_scores=selection.parameter_scores(),
        token_scores=_token_scores(selection, source, noise),
        sources=RowSources("source", tuple(str(record.get("source", "")) for record in records)),
    )


def _token_scores(selection: Selection, source: np.ndarray, noise: np.ndarray) -> dict[str, list[Any]] | None:
    if selection.token_scores is None:
        return None
    by_row = {row["example_id"]: row for row in selection.token_scores.to_pylist()}
    ids = [k for k, row in enumerate(source.tolist()) if row in by_row]
    return {
        "example_id": ids,
        "token_id": [by_row[source[k]]["token_id"] for k in ids],
        "score": [(noise[k] * np.array(by_row[source[k]]["score"])) for k in ids],
    }


def main() -> None:
    """Measure one size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("selection")
    parser.add_argument("--rows", type=int, default=200_000)
    options = parser.parse_args()
    selection = load_selection(options.selection)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        records = write_pool(selection, folder / "pool.jsonl", options.rows)
        enlarge(selection, folder / "selection", records, folder / "pool.jsonl")
        command = ["report", str(folder / "selection"), "--output_dir", str(folder / "report")]
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", _MEASURED, *command], check=True, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        size = (folder / "report" / "report.html").stat().st_size
        cpu, peak = map(float, done.stdout.splitlines()[-1].split())
        costs = f"{seconds:.1f} s ({cpu:.1f} s of CPU time), {peak:.2f} GiB of memory"
        print(f"{options.rows:,} rows: {costs}; a page of {size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
