import errno
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from dualsft.data import cache_folder, lines
from dualsft.data.records import Records, read_records
from tests.world.data import LINES, write_jsonl


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few lines are many, and few bytes are written at once."""
    monkeypatch.setattr(cache_folder, "LARGE", 100)
    monkeypatch.setattr(lines, "_AT_ONCE", 50)


@pytest.fixture
def sources(tmp_path: Path) -> list[Any]:
    """Sources of lines and of rows, one of which is sampled."""
    pool = write_jsonl(tmp_path / "pool.jsonl", LINES)
    (tmp_path / "table.json").write_text(json.dumps([json.loads(line) for line in LINES], indent=1))
    (tmp_path / "empty.jsonl").write_text("\n")
    return [pool, {"path": str(tmp_path / "*.json*"), "cap": 7}, str(tmp_path / "table.json")]


def told(records: Records) -> list[Any]:
    """All that is known of records."""
    rows = range(len(records))
    of_rows = [(records.line(i), records[i], records.location(i), records.source_of(i)) for i in rows]
    return [of_rows, list(records), records.parts, records.fingerprint]


def test_many_lines_are_in_a_file_without_a_name(
    sources: list[Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """What is known of records is the same whether their lines are in memory or in a file, which nobody finds."""
    few = read_records(sources)
    request.getfixturevalue("many")
    records = read_records(sources, cache_dir=str(tmp_path / "cache"))
    assert told(records) == told(few)
    assert [records.line(i) for i in range(len(LINES))] == LINES
    assert records.remarks == few.remarks
    assert (records.line(-1), few.line(-1)) == (records.line(len(records) - 1),) * 2
    with pytest.raises(IndexError):
        records[len(records)]
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize("written", [0, 1, 4])
def test_a_full_disk(sources: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int) -> None:
    """Whenever nothing more can be written the lines are in memory, and one sentence says so."""
    expected = told(read_records(sources, cache_dir=str(tmp_path)))

    class Full:
        """A file on a disk with room for a few blocks, of which the last is cut."""

        def __init__(self) -> None:
            self.file, self.left = made(dir=tmp_path, buffering=0), written
            self.fileno, self.close = self.file.fileno, self.file.close

        def write(self, block: bytes) -> int:
            if self.left == 0:
                self.file.write(block[:5])
                raise OSError(errno.ENOSPC, "No space left on device")
            self.left -= 1
            return int(self.file.write(block))

    made: Any = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    records = read_records(sources, cache_dir=str(tmp_path))
    assert told(records) == expected
    assert sum("No space left on device" in remark for remark in records.remarks) == 1
