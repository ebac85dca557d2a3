"""What is said of the data before work starts."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from dualsft.data.examples import Examples, encode_examples
from dualsft.data.options import FormatOptions
from dualsft.data.records import read_records
from dualsft.selection.near_duplicates import hashed_shingles, jaccard
from dualsft.selection.overlap import remarks, shared_rows
from tests.world.data import sums, write_jsonl
from tests.world.jobs import SGD, select, write_inputs
from tests.world.tokenizers import byte_level

OPTIONS = FormatOptions()
POOL = [f"a text of a dozen words about the number {i} and one more word" for i in range(40)]
TARGET = [POOL[3], POOL[3].replace("more", "other"), "nothing like it in the pool at all", POOL[5].upper(), "word"]


def examples(path: Path, texts: Sequence[str]) -> Examples:
    """Examples of plain text."""
    source = write_jsonl(path, [{"text": text} for text in texts])
    return encode_examples(read_records(source), byte_level(), OPTIONS, 200)


def test_shared_rows_are_counted_as_by_comparing_all(tmp_path: Path) -> None:
    """Equal texts, and similar ones, are those that a comparison of every pair finds."""
    pool, target = examples(tmp_path / "a.jsonl", POOL), examples(tmp_path / "b.jsonl", TARGET)
    sets = [[hashed_shingles(text, 3) for text in of] for of in (POOL, TARGET)]
    similar = {k for k, one in enumerate(sets[1]) if any(jaccard(one, other) >= 0.8 for other in sets[0])}
    same = {k for k, text in enumerate(TARGET) if text in POOL}
    assert (len(same), len(similar - same)) == (1, 1)
    assert shared_rows(pool, target, OPTIONS) == (1, 1)


def test_blank_rows_are_nobodys_copies(tmp_path: Path) -> None:
    """Rows without anything to learn do not count."""
    pool, target = examples(tmp_path / "a.jsonl", ["", "a b c d"]), examples(tmp_path / "b.jsonl", ["", " "])
    assert shared_rows(pool, target, OPTIONS) == (0, 0)


def test_remarks(tmp_path: Path) -> None:
    """Rows in both sets, one source given twice, and files not read have a sentence each; else there is none."""
    pool, target = examples(tmp_path / "a.jsonl", POOL), examples(tmp_path / "b.jsonl", TARGET)
    apart = examples(tmp_path / "c.jsonl", ["quite another matter"])
    assert list(remarks({"data.train": pool, "data.validation": apart}, OPTIONS)) == []
    assert list(remarks({"data.validation": target, "data.train": pool}, OPTIONS)) == [
        "2 of the 5 rows of data.validation are in data.train: 1 as they stand, 1 nearly (Jaccard similarity of word "
        "3-grams of at least 0.8)."
    ]
    sets = {"data.train": pool, "data.validation.one": apart, "data.validation.two": apart}
    assert list(remarks(sets, OPTIONS)) == ["data.validation.one and data.validation.two hold the same 1 rows."]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").touch()
    write_jsonl(tmp_path / "folder" / "a.jsonl", [{"text": "one two three"}])
    folder = encode_examples(read_records(str(tmp_path / "folder")), byte_level(), OPTIONS, 200)
    assert list(remarks({"data.train": folder}, OPTIONS)) == ["data.train: notes.txt in its folder is not read."]


def test_select_tells_of_them_before_it_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run whose validation rows are in its pool says so on standard error, and goes on."""
    rows = sums(8)
    inputs = write_inputs(tmp_path, rows, [*rows[:2], {"prompt": "Rome?", "response": "Italy."}])
    made = select(inputs, tmp_path / "out", SGD)
    assert "dualsft: 2 of the 3 rows of data.validation are in data.train: 2 as they stand" in capsys.readouterr().err
    assert made.about.counts.examples.scored == 8
