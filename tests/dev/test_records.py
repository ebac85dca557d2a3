"""The quick start's target: records extracted from sentences."""

from itertools import islice
from pathlib import Path

from dev.quickstart import records, tasks
from dev.quickstart.make_data import read_jsonl


def test_the_shipped_files_are_made_anew(tmp_path: Path) -> None:
    """Byte for byte, from the seed alone."""
    records.main(tmp_path)
    names = sorted(path.name for path in records.DATA.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    assert all((tmp_path / name).read_bytes() == (records.DATA / name).read_bytes() for name in names)


def test_the_target_is_new_and_held_out() -> None:
    """The base model was trained on nothing of its form, and no prompt is in two files."""
    pretrained = list(islice(tasks.stream("pretrain", 0), 5000))
    assert not any(row["prompt"].startswith("Record:") or "who:" in row["response"] for row in pretrained)
    files = {path.stem: {row["prompt"] for row in read_jsonl(path)} for path in records.DATA.iterdir()}
    assert len(set().union(*files.values())) == sum(map(len, files.values()))


def test_spoilt_rows_are_wrong() -> None:
    """A sentence tells all that a target row's answer says, and what a spoilt row's says but for chance never."""
    told: dict[str, list[bool]] = {records.TARGET: [], records.SPOILT: []}
    for row in read_jsonl(records.DATA / "pool.jsonl"):
        if row["source"] in told:
            facts = [part.split(": ")[1] for part in row["response"].split("; ")]
            told[row["source"]].append(all(fact in row["prompt"] for fact in facts))
    assert all(told[records.TARGET])
    assert sum(told[records.SPOILT]) <= 1
    assert len(told[records.TARGET]) == len(told[records.SPOILT]) == records.POOL // 10
