"""Tables by the physical types of their columns."""

import json
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dualsft.data.examples import load_examples
from dualsft.data.records import read_records
from dualsft.errors import UserError
from tests.world.tokenizers import byte_level

TEXTS: dict[str, pa.Array] = {
    "string": pa.array(["é", None]),
    "large string": pa.array(["é", None], pa.large_string()),
    "string view": pa.array(["é", None], pa.string_view()),
    "dictionary": pa.array(["é", None]).dictionary_encode(),
    "large dictionary": pa.array(["é", None], pa.large_string()).dictionary_encode(),
    "binary": pa.array(["é".encode(), None]),
    "large binary": pa.array(["é".encode(), None], pa.large_binary()),
    "fixed size binary": pa.array(["é".encode(), None], pa.binary(2)),
}
WRITTEN: dict[str, tuple[pa.Array, Any]] = {
    "half float": (pa.array(np.array([1.5], np.float16)), 1.5),
    "decimal": (pa.array([Decimal("1.50")]), "1.50"),
    "date": (pa.array([date(2024, 1, 31)]), "2024-01-31"),
    "timestamp": (pa.array([datetime(2024, 1, 31, 12)], pa.timestamp("us")), "2024-01-31 12:00:00"),
    "nanoseconds": (pa.array([1], pa.timestamp("ns")), "1970-01-01 00:00:00.000000001"),
    "list view": (pa.array([["a"]], pa.list_view(pa.string())), ["a"]),
    "bytes in a struct": (pa.array([{"role": b"user"}]), {"role": "user"}),
    "no text": (pa.array([b"\xff\x00"]), {"base64": "/wA="}),
}


def stream(path: Path, table: pa.Table) -> str:
    """Writes a stream of batches, as `datasets` does."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return str(path)


def feather(path: Path, table: pa.Table) -> str:
    """Writes a file with an index."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    return str(path)


@pytest.mark.parametrize("kind", TEXTS)
def test_text_of_any_physical_type_is_text(kind: str, tmp_path: Path) -> None:
    """A column of text gives the same lines whatever its type is; null stays null."""
    table = pa.table({"text": TEXTS[kind]})
    if kind != "string view":  # which Parquet has not
        pq.write_table(table, tmp_path / "pool.parquet")
        assert read_records(str(tmp_path / "pool.parquet")).line(0) == '{"text": "é"}'
    records = read_records(stream(tmp_path / "pool.arrow", table))
    assert list(records) == [{"text": "é"}, {"text": None}]


@pytest.mark.parametrize("kind", WRITTEN)
def test_values_that_json_has_no_type_for(kind: str, tmp_path: Path) -> None:
    """Each has one form, and none that only looks like text."""
    column, expected = WRITTEN[kind]
    assert list(read_records(stream(tmp_path / "pool.arrow", pa.table({"x": column})))) == [{"x": expected}]


@pytest.mark.filterwarnings("ignore:.*the column response is no part of the text")
def test_bytes_that_are_no_text_are_not_learnt(tmp_path: Path) -> None:
    """A response of such bytes is refused with its row; in a column that no format reads they are no obstacle."""
    table = pa.table({"prompt": ["a"], "response": [b"\xff\x00"], "completion": ["b"]})
    path = stream(tmp_path / "pool.arrow", table)
    with pytest.raises(UserError, match=r"row 0: 'response' must be text, not dict"):
        load_examples(path, byte_level())
    assert len(load_examples(path, byte_level(), response_column="completion")) == 1


def test_an_image_is_refused_by_its_column() -> None:
    """What has no form at all is not written as the address of an object."""
    from dualsft.data.tables import dumped

    with pytest.raises(UserError, match=r"pool: it holds a object, which is neither text nor a number; leave"):
        dumped({"image": object()}, "pool")


@pytest.mark.parametrize("write", [stream, feather])
def test_arrow_files(write: Any, tmp_path: Path) -> None:
    """Both forms are read; one that is cut anywhere is refused, never read in part."""
    table = pa.table({"text": [f"row {i}" for i in range(3000)]})
    path = Path(write(tmp_path / "pool.arrow", table))
    assert [record["text"] for record in read_records(str(path))] == table["text"].to_pylist()
    content = path.read_bytes()
    for kept in (0, 4, len(content) // 2, len(content) - 8):
        path.write_bytes(content[:kept])
        with pytest.raises(UserError, match=r"pool\.arrow (is cut short|cannot be read as Arrow)"):
            read_records(str(path))


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    """The last one does not silently win: not in CSV, Parquet or Arrow, nor under one key of a JSON object."""
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "pool.parquet")
    stream(tmp_path / "pool.arrow", table)
    (tmp_path / "pool.csv").write_text("text,text\na,b\n", encoding="utf-8")
    for name in ("pool.parquet", "pool.arrow", "pool.csv"):
        with pytest.raises(UserError, match=rf"{name} has two columns of the name 'text'"):
            read_records(str(tmp_path / name))
    line = '{"prompt": "q", "text": "a", "text": "b"}'
    (tmp_path / "pool.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises(UserError, match=r"line 1 \(row 0\): not a record \(two values under the key 'text'\)"):
        read_records(str(tmp_path / "pool.jsonl"))
    (tmp_path / "pool.json").write_text(f"[{line}]", encoding="utf-8")
    with pytest.raises(UserError, match=r"pool\.json: not a record \(two values under the key 'text'\)"):
        read_records(str(tmp_path / "pool.json"))


def test_an_unknown_time_zone(tmp_path: Path) -> None:
    """A column of times in a zone that this system does not know ends in a sentence, as other damage does."""
    when = pa.array([1], pa.timestamp("us", "Mars/Base"))
    pq.write_table(pa.table({"text": ["a"], "when": when}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet cannot be read as Parquet \(.*Mars/Base"):
        list(read_records(str(tmp_path / "a.parquet")))


def test_nameless_csv_columns_may_be_many(tmp_path: Path) -> None:
    """Spreadsheets leave commas at the ends of lines, which name nothing."""
    (tmp_path / "pool.csv").write_text("text,,\na,,\n", encoding="utf-8")
    assert list(read_records(str(tmp_path / "pool.csv"))) == [{"text": "a", "": ""}]


def test_folders_of_save_to_disk(tmp_path: Path) -> None:
    """A Dataset and each split of a DatasetDict are read as they were saved; another split is refused."""
    rows = [{"prompt": f"p{i}", "response": f"r{i}"} for i in range(5)]
    data = datasets.Dataset.from_list(rows)
    data.select([3, 1]).save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=data, test=data.select([0])).save_to_disk(tmp_path / "many")
    assert list(read_records(str(tmp_path / "one"))) == [rows[3], rows[1]]
    assert read_records(str(tmp_path / "many")).line(4) == json.dumps(rows[4])
    assert list(read_records(str(tmp_path / "many"), "test")) == rows[:1]
    with pytest.raises(UserError, match=r"many has the splits train, test, but not 'validation': name one"):
        read_records(str(tmp_path / "many"), "validation")
    (tmp_path / "one" / "state.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"one, written by save_to_disk, cannot be read"):
        read_records(str(tmp_path / "one"))
