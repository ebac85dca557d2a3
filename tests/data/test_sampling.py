"""Shares and caps: how many records are taken, which, and what is told of the others."""

from pathlib import Path

import pytest

from dualsft.data.records import read_records
from dualsft.data.sampling import taken_rows
from dualsft.data.sources import SourceOptions
from tests.world.data import write_jsonl


@pytest.mark.parametrize(
    ("share", "cap", "count", "due"),
    [(None, 3, 10, 3), (None, 30, 10, 10), (0.25, None, 10, 2), (0.01, None, 10, 1), (0.5, 3, 10, 3), (1, None, 4, 4)],
)
def test_how_many_are_taken(share: float | None, cap: int | None, count: int, due: int) -> None:
    """A share is rounded, and at least one record; a cap holds with it; the rows are different ones, ascending."""
    rows = taken_rows(SourceOptions("x", share=share, cap=cap), count)
    assert len(rows) == due
    assert rows == sorted(set(rows))
    assert set(rows) <= set(range(count))


def test_the_draw_is_the_same_on_every_system() -> None:
    """These rows are drawn wherever and whenever it is, and a larger cap keeps those of a smaller one."""
    assert taken_rows(SourceOptions("x", cap=4), 20) == [0, 1, 4, 17]
    assert taken_rows(SourceOptions("x", cap=4, seed=1), 20) == [1, 7, 10, 17]
    assert set(taken_rows(SourceOptions("x", cap=4), 20)) < set(taken_rows(SourceOptions("x", cap=9), 20))


def test_all_rows_are_drawn_alike() -> None:
    """Over many seeds each row is taken about as often as any other: within five standard deviations of the mean."""
    counts = [0] * 10
    for seed in range(2000):
        for row in taken_rows(SourceOptions("x", cap=3, seed=seed), 10):
            counts[row] += 1
    assert all(abs(count - 600) < 5 * (2000 * 0.3 * 0.7) ** 0.5 for count in counts)


def test_a_sampled_source_in_a_pool(tmp_path: Path) -> None:
    """The records that are taken keep their order and their lines' numbers, and what is left out is told."""
    rows = [{"text": f"text {k}"} for k in range(30)]
    part, whole = write_jsonl(tmp_path / "part.jsonl", rows), write_jsonl(tmp_path / "whole.jsonl", rows[:2])
    pool = read_records({"some": {"path": part, "cap": 5}, "all": {"path": whole, "cap": 9}})
    taken = taken_rows(SourceOptions(part, cap=5), 30)
    assert [pool[row] for row in range(5)] == [rows[row] for row in taken]
    assert [pool[row] for row in (5, 6)] == rows[:2]
    assert pool.location(4) == f"some: part.jsonl, line {taken[4] + 1} (row 4)"
    assert pool.remarks == ("some: 5 of its 30 records are taken at random (cap 5, seed 0), 25 are left out.",)
    (half,) = read_records({"path": part, "share": 0.5}).remarks
    assert half == f"{part}: 15 of its 30 records are taken at random (share 0.5, seed 0), 15 are left out."


def test_a_share_is_of_all_files_of_a_source(tmp_path: Path) -> None:
    """What is taken of a folder is drawn from its files together."""
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name}{k}"} for k in range(10)])
    pool = read_records({"path": str(tmp_path), "cap": 8})
    both = [f"{name}{k}" for name in "ab" for k in range(10)]
    assert [row["text"] for row in pool] == [both[row] for row in taken_rows(SourceOptions("x", cap=8), 20)]
