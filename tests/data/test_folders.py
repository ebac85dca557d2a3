"""Which files of a folder are read."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets.data_files import DataFilesDict, get_data_patterns

from dualsft import load_examples
from dualsft.data.records import read_records
from dualsft.errors import UserError
from tests.world.tokenizers import CHATML, byte_level

LAYOUTS: dict[str, dict[str, list[str]]] = {
    "three files": {"train": ["train.jsonl"], "validation": ["validation.jsonl"], "test": ["test.jsonl"]},
    "other words": {"train": ["my-training_1.jsonl"], "validation": ["dev.jsonl"], "test": ["eval.2.jsonl"]},
    "shards": {
        "train": ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"],
        "test": ["data/test-00000-of-00001.jsonl"],
    },
    "splits of other names": {
        "train_sft": ["data/train_sft-00000-of-00001-a1b2.jsonl"],
        "train_gen": ["data/train_gen-00000-of-00001-c3d4.jsonl"],
    },
    "folders": {"train": ["train/a.jsonl", "train/b/test.jsonl"], "validation": ["valid/a.jsonl"]},
    "one split alone": {"test": ["test_a.jsonl", "test_b.jsonl"]},
}


def write(folder: Path, names: list[str]) -> None:
    """Writes files of one record each: the file's own name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"text": name}) + "\n", encoding="utf-8")


def read(folder: Path, split: str) -> list[str]:
    """The names of the files that are read for a split."""
    return [record["text"] for record in read_records(str(folder), split)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_split_decides_as_in_datasets(layout: str, tmp_path: Path) -> None:
    """Each split is read from its own files, which are those that `datasets` resolves; what is left out is named."""
    splits = LAYOUTS[layout]
    write(tmp_path, [name for names in splits.values() for name in names])
    patterns = get_data_patterns(str(tmp_path))
    theirs = DataFilesDict.from_patterns(patterns, str(tmp_path), allowed_extensions=[".jsonl"])
    for split, names in splits.items():
        assert read(tmp_path, split) == sorted(names)
        assert sorted(str(Path(file).relative_to(tmp_path)) for file in theirs[split]) == sorted(names)
        others = sorted(name for other, of in splits.items() if other != split for name in of)
        assert list(read_records(str(tmp_path), split).left_out) == others


def test_files_of_different_columns(tmp_path: Path) -> None:
    """Each file of a folder, and of a glob's matches, is read by its own columns, and as it is read alone."""
    rows: dict[str, dict[str, Any]] = {
        "a.jsonl": {"question": "2 + 2?", "answer": "4"},
        "b.csv": {"prompt": "3 + 3?", "response": "6"},
        "c.jsonl": {"prompt": "4 + 4?", "completion": "8"},
        "d.jsonl": {"text": "A text."},
        "e.jsonl": {"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]},
    }
    for name, row in rows.items():
        csv = f"{','.join(row)}\n{','.join(map(str, row.values()))}\n"
        (tmp_path / name).write_text(csv if name.endswith("csv") else json.dumps(row), encoding="utf-8")
    tokenizer = byte_level(CHATML)
    alone = [load_examples(str(tmp_path / name), tokenizer)[0] for name in rows]
    for path in (tmp_path, tmp_path / "*"):
        together = load_examples(str(path), tokenizer)
        assert [row["input_ids"] for row in together] == [row["input_ids"] for row in alone]
        assert [row["labels"] for row in together] == [row["labels"] for row in alone]


def test_globs(tmp_path: Path) -> None:
    """A glob reads what it matches by name, ``**`` in every folder below; what exists under its name is no glob."""
    write(tmp_path, ["b.jsonl", "a.jsonl", "more/c.jsonl", "test.jsonl", "[ab].jsonl"])
    assert read(tmp_path / "?.jsonl", "train") == ["a.jsonl", "b.jsonl"]
    assert read(tmp_path / "**" / "c.jsonl", "train") == ["more/c.jsonl"]
    assert read(tmp_path / "t*.jsonl", "train") == ["test.jsonl"]
    assert read(tmp_path / "[ab].jsonl", "train") == ["[ab].jsonl"]
    with pytest.raises(UserError, match=r"x\*\.jsonl matches no file: mend the pattern"):
        read(tmp_path / "x*.jsonl", "train")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"notes\.txt is not a kind of file that can be read"):
        read(tmp_path / "*", "train")


def test_a_split_that_the_folder_has_not(tmp_path: Path) -> None:
    """The training rows are not the validation set for want of another: the splits that there are are named."""
    write(tmp_path, ["train.jsonl", "test.jsonl"])
    with pytest.raises(UserError, match=r"has the splits test, train, but not 'validation': name one"):
        read(tmp_path, "validation")


@pytest.mark.parametrize("names", [["train.jsonl", "more.jsonl"], ["train_test.jsonl", "test.jsonl"]], ids=str)
def test_a_file_of_no_split_beside_those_of_one(names: list[str], tmp_path: Path) -> None:
    """It is neither read with every split nor passed over."""
    write(tmp_path, names)
    with pytest.raises(UserError, match=r"of the split \w+ by its name, and \w+\.jsonl, of none: give the file itself"):
        read(tmp_path, "train")


def test_without_splits_every_split_is_all(tmp_path: Path) -> None:
    """Files whose names say nothing are one set, by name, whatever split is asked for; only the folder's own count."""
    write(tmp_path, ["b.jsonl", "a.jsonl", "old/c.jsonl", ".git/d.jsonl"])
    (tmp_path / "notes.txt").write_text("not data", encoding="utf-8")
    (tmp_path / "dataset_infos.json").write_text("{}", encoding="utf-8")
    for split in ("train", "validation"):
        assert read(tmp_path, split) == ["a.jsonl", "b.jsonl"]
    left_out = read_records(str(tmp_path)).left_out
    assert left_out == ("dataset_infos.json", "notes.txt", "old/c.jsonl")


def test_the_readme_decides_as_on_the_hub(tmp_path: Path) -> None:
    """Where README.md gives the files of each split, names do not matter; several configurations are refused."""
    write(tmp_path, ["one.jsonl", "two.jsonl"])
    readme = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: one*\n"
    readme += "  - split: held_out\n    path: [two.jsonl]\n"
    (tmp_path / "README.md").write_text(f"{readme}---\n# Data\n", encoding="utf-8")
    assert read(tmp_path, "train") == ["one.jsonl"]
    assert read(tmp_path, "held_out") == ["two.jsonl"]
    (tmp_path / "README.md").write_text(f"{readme}- config_name: socratic\n---\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"several configurations \(default, socratic\)"):
        read(tmp_path, "train")
    write(tmp_path, ["sub/three.jsonl", "more.jsonl"])
    (tmp_path / "README.md").write_text(f"{readme}  - split: test\n    path: sub/*\n---\n", encoding="utf-8")
    assert read(tmp_path, "test") == ["sub/three.jsonl"]  # files that it does not name are left out
    assert list(read_records(str(tmp_path), "test").left_out) == ["README.md", "more.jsonl", "one.jsonl", "two.jsonl"]
    (tmp_path / "more.jsonl").unlink()
    (tmp_path / "README.md").write_text("---\nconfigs: [\n---\n", encoding="utf-8")
    assert read(tmp_path, "train") == ["one.jsonl", "two.jsonl"]


@pytest.mark.parametrize("given", ["one.jsonl", "[one.jsonl]", "[{split: train, path: one.jsonl}]", "[{path: one*}]"])
def test_files_that_the_readme_names_without_a_split(given: str, tmp_path: Path) -> None:
    """They are of train, and the others are of no split."""
    write(tmp_path, ["one.jsonl", "two.jsonl"])
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- data_files: {given}\n---\n", encoding="utf-8")
    assert read(tmp_path, "train") == ["one.jsonl"]
    with pytest.raises(UserError, match="has the splits train, but not 'test'"):
        read(tmp_path, "test")


def test_the_folder_that_the_readme_names(tmp_path: Path) -> None:
    """Its ``data_dir`` holds the files, by their names or by patterns in it; what lies elsewhere is left out."""
    write(tmp_path, ["main/train.jsonl", "main/test.jsonl", "train.jsonl", "old/train.jsonl"])
    (tmp_path / "README.md").write_text("---\nconfigs:\n- data_dir: main\n---\n", encoding="utf-8")
    assert read(tmp_path, "train") == ["main/train.jsonl"]
    assert read(tmp_path, "test") == ["main/test.jsonl"]
    readme = "---\nconfigs:\n- data_dir: main\n  data_files:\n  - split: held_out\n    path: te*\n---\n"
    (tmp_path / "README.md").write_text(readme, encoding="utf-8")
    assert read(tmp_path, "held_out") == ["main/test.jsonl"]
    (tmp_path / "README.md").write_text("---\nconfigs:\n- data_dir: nowhere\n---\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"holds no data in nowhere/, which its README\.md names"):
        read(tmp_path, "train")


@pytest.mark.parametrize(
    "pattern", ["/etc/*.jsonl", "'**.jsonl'", "'{one,two}.jsonl'", "../*.jsonl", "''", "hf://a/b.jsonl"]
)
def test_patterns_that_match_nothing(pattern: str, tmp_path: Path) -> None:
    """A README.md that names other files than are there is no word on those, which are not read for every split."""
    write(tmp_path, ["one.jsonl", "two.jsonl"])
    readme = f"---\nconfigs:\n- data_files:\n  - split: train\n    path: {pattern}\n---\n"
    (tmp_path / "README.md").write_text(readme, encoding="utf-8")
    with pytest.raises(UserError, match=r"holds none of the files that its README\.md names"):
        read(tmp_path, "train")
    (tmp_path / "two.jsonl").rename(tmp_path / "test.jsonl")
    (tmp_path / "one.jsonl").rename(tmp_path / "train.jsonl")
    assert read(tmp_path, "train") == ["one.jsonl"]
    for odd in ("5", "null", "{a: b}"):
        (tmp_path / "README.md").write_text(readme.replace(pattern, odd), encoding="utf-8")
        assert read(tmp_path, "train") == ["one.jsonl"]


@pytest.mark.parametrize("other", ["a.jsonl.gz", "a.json", "a.parquet"])
def test_a_file_twice(other: str, tmp_path: Path) -> None:
    """Rows are not read twice because a download was unpacked or converted."""
    write(tmp_path, ["a.jsonl", other, "b.jsonl"])
    with pytest.raises(UserError, match=r"holds a\.json\w* and a\.[\w.]+, which is the same .*: remove one"):
        read(tmp_path, "train")


def test_a_part_that_is_missing(tmp_path: Path) -> None:
    """A download that was broken off is not read as the whole; a part of another split may be absent."""
    write(tmp_path, ["train-00000-of-00003.jsonl", "train-00002-of-00003-ab.jsonl", "test-00000-of-00001.jsonl"])
    with pytest.raises(UserError, match=r"lacks train-00001-of-00003, one of 3 parts: fetch it"):
        read(tmp_path, "train")
    assert read(tmp_path, "test") == ["test-00000-of-00001.jsonl"]


@pytest.mark.parametrize("split", ["train[:10]", "train[50%:]", "train+test"])
def test_a_part_of_a_split_is_not_the_whole(split: str, tmp_path: Path) -> None:
    """What would be part of a hub's dataset is refused of a file or folder, rather than read whole."""
    write(tmp_path, ["a.jsonl"])
    for path in (tmp_path, tmp_path / "a.jsonl"):
        with pytest.raises(UserError, match=r"is read whole, so that .train.*write the rows to be read to a file"):
            read(path, split)
