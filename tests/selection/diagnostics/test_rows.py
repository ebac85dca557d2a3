from pathlib import Path
from typing import Any

from dualsft.allocators import PerSourceQuota, TopK
from dualsft.data.records import read_records
from dualsft.selection.diagnostics import RowSources, Target, row_sources
from dualsft.selection.diagnostics.levels import quantiles
from tests.world.data import write_jsonl
from tests.world.jobs import SGD, select, write_inputs

ROWS: list[dict[str, Any]] = [
    {"prompt": "a?", "response": "yes", "source": "one", "kind": 7},
    {"prompt": "b?", "response": "no", "source": None},
    {"prompt": "c?", "response": "no", "source": "two", "kind": 8},
]


def test_a_column_names_the_sources(tmp_path: Path) -> None:
    """The column source, or that of the quota; a record without it has the empty name; other values are texts."""
    records = read_records(write_jsonl(tmp_path / "pool.jsonl", ROWS))
    assert row_sources(records, TopK()) == RowSources("source", ("one", "", "two"))
    assert row_sources(records, PerSourceQuota("kind")) == RowSources("kind", ("7", "", "8"))


def test_files_of_a_folder_are_sources(tmp_path: Path) -> None:
    """Where no column says more; a single file is none."""
    plain = [{k: row[k] for k in ("prompt", "response")} for row in ROWS]
    (tmp_path / "pool").mkdir()
    write_jsonl(tmp_path / "pool" / "x.jsonl", plain[:1])
    one = read_records(str(tmp_path / "pool"))
    assert row_sources(one, TopK()) is None
    write_jsonl(tmp_path / "pool" / "y.jsonl", plain[1:])
    found = row_sources(read_records(str(tmp_path / "pool")), TopK())
    assert found is not None
    assert found.column is None
    assert [Path(name).name for name in found.names] == ["x.jsonl", "y.jsonl", "y.jsonl"]


def test_a_selection_knows_its_sources_and_its_target(tmp_path: Path) -> None:
    """How many rows of each source there are and were chosen; lengths and sources of what the target teaches."""
    target = [{"prompt": "d?", "response": "yes it", "source": "two"}, {"prompt": "", "response": "", "source": "x"}]
    mixed = write_inputs(tmp_path / "in", [*ROWS, *ROWS], target)
    made = select(mixed, tmp_path / "out", {**SGD, "data_budget": 3})
    found, chosen = made.diagnostics, made.records
    assert found.sources is not None
    assert {group.name: (group.rows, group.selected) for group in found.sources.groups} == {
        name or "": (2, sum(record["source"] == name for record in chosen)) for name in ("one", None, "two")
    }
    lengths = [len([label for label in labels if label != -100]) for _, labels in mixed.examples("validation").values()]
    assert found.basis.target == Target(1, quantiles(lengths), {"two": 1})
