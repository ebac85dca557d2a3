"""Compressed files, and files that cannot be read."""

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from dualsft.data.records import read_records
from dualsft.errors import UserError

LINES = ['{"text":  "é"}', '{"text": "\u2028b"}'] * 400
PLAIN = "".join(f"{line}\n" for line in LINES).encode()


def zstd(content: bytes) -> bytes:
    """Compresses into one frame."""
    with (sink := pa.BufferOutputStream()) and pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    compressed: bytes = sink.getvalue().to_pybytes()
    return compressed


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


@pytest.mark.parametrize("ending", PACKERS)
def test_compressed_lines_are_the_lines(ending: str, tmp_path: Path) -> None:
    """Verbatim, with the fingerprint of the plain file, in one part or in several; a cut file is refused."""
    (tmp_path / "plain.jsonl").write_bytes(PLAIN)
    plain = read_records(str(tmp_path / "plain.jsonl"))
    pack, half = PACKERS[ending], len(PLAIN) // 2
    path = tmp_path / f"pool.jsonl{ending}"
    for content in (pack(PLAIN), pack(PLAIN[:half]) + pack(PLAIN[half:])):
        path.write_bytes(content)
        records = read_records(str(path))
        assert [records.line(row) for row in range(len(records))] == LINES
        assert records.fingerprint == plain.fingerprint
    assert records.location(1) == f"pool.jsonl{ending}, line 2 (row 1)"
    for broken in (pack(PLAIN)[:-6], PLAIN):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=rf"pool\.jsonl{ending} cannot be read \(.+\); give the whole file"):
            read_records(str(path))


@pytest.mark.parametrize(
    ("name", "content"), [("p.csv.gz", b"text\na\n"), ("p.tsv.gz", b"text\tn\na\t1"), ("p.json.gz", b'[{"text":"a"}]')]
)
def test_other_kinds_compressed(name: str, content: bytes, tmp_path: Path) -> None:
    """The ending before the compression's tells the kind."""
    (tmp_path / name).write_bytes(gzip.compress(content))
    assert read_records(str(tmp_path / name))[0]["text"] == "a"


@pytest.mark.parametrize("name", ["p.zip", "p.jsonl.zip", "p.tar.gz", "p.tgz", "p.parquet.gz", "p.gz"])
def test_archives_are_refused_by_name(name: str, tmp_path: Path) -> None:
    """An archive may hold several files, and a table is compressed inside."""
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=rf"{name} is (an archive|compressed, and .* alone may be): unpack it"):
        read_records(str(tmp_path / name))


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv", "p.parquet", "p.arrow"])
def test_pointers_of_git_lfs(name: str, tmp_path: Path) -> None:
    """A clone without Git LFS has pointers in place of data, which for CSV would pass as a record."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / name).write_text(pointer, encoding="utf-8")
    with pytest.raises(UserError, match=rf"{name} is a pointer of Git LFS, .* `git lfs pull`"):
        read_records(str(tmp_path / name))


def test_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    """A file of a folder that is gone is refused, not passed over."""
    (tmp_path / "a.jsonl").write_text('{"text": "a"}', encoding="utf-8")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match=r"b\.jsonl cannot be read \(No such file or directory\)"):
        read_records(str(tmp_path))


@pytest.mark.parametrize("line", ['{"a": ' + "[" * 100_000, '{"n": ' + "1" * 5000 + "}"], ids=["deep", "long"])
def test_json_that_python_does_not_take(line: str, tmp_path: Path) -> None:
    """Nesting without end and numbers of thousands of digits end in a sentence with the row."""
    (tmp_path / "p.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises(UserError, match=r"p\.jsonl, line 1 \(row 0\): not a record") as refused:
        read_records(str(tmp_path / "p.jsonl"))
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("method", ["is_dir", "exists"])
def test_what_may_not_be_looked_at(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's reason is told: the source may well exist."""

    def refuse(self: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, method, refuse)
    with pytest.raises(UserError, match=r"p\.jsonl cannot be read \(Permission denied\)"):
        read_records(str(tmp_path / "p.jsonl"))
