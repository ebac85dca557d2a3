"""Several sources as one pool: what may be given, and that nothing is lost or mixed up on the way."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dualsft.data.examples import Examples, encode_examples
from dualsft.data.options import FormatOptions, validation_sources
from dualsft.data.records import Records, read_records
from dualsft.data.sources import described, paths_of, sources_of, with_paths
from dualsft.errors import UserError
from tests.world.data import write_jsonl
from tests.world.tokenizers import CHATML, byte_level

GSM8K = [{"question": f"{k} + 1?", "answer": f"It is {k + 1}."} for k in range(4)]
CODE = [{"prompt": f"Write {k}", "completion": f"print({k})"} for k in range(3)]
CHAT = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}]
OWN = [{"q": "Say", "a": "ok"}]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with four files of different columns, two of them in folders under one name."""
    files: dict[str, list[dict[str, Any]]] = {"gsm/train": GSM8K, "code/train": CODE, "chat": CHAT, "own": OWN}
    for name, rows in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def encoded(records: Records, **options: Any) -> Examples:
    """The records as examples of at most 64 tokens, one to a byte."""
    return encode_examples(records, byte_level(CHATML), FormatOptions(**options), 64)


OF_ITS_OWN = {"path": "own.jsonl", "prompt_column": "q", "response_column": "a"}
PARTS: list[Any] = ["gsm/train.jsonl", "code/train.jsonl", "chat.jsonl", OF_ITS_OWN]
POOLS: dict[str, Any] = {
    "list": PARTS,
    "mapping": dict(zip("abcd", PARTS, strict=True)),
    "lists in a mapping": {"a": PARTS[:2], "b": PARTS[2:]},
}


@pytest.mark.parametrize("form", POOLS)
def test_a_pool_is_its_sources_end_to_end(world: Path, form: str) -> None:
    """Rows, lines and tokens are those that each source has alone, in the order given, as is every example's id."""
    pool = read_records(POOLS[form])
    alone = [read_records(part) for part in PARTS]
    assert [pool.line(row) for row in range(len(pool))] == [one.line(row) for one in alone for row in range(len(one))]
    together, apart = encoded(pool), [encoded(one) for one in alone]
    for column in ("input_ids", "labels"):
        assert together.dataset[column][:] == [row for one in apart for row in one.dataset[column][:]]
    assert together.dataset["example_id"][:] == list(range(len(pool)))
    joined = write_jsonl(world / "joined.jsonl", [row for one in alone for row in one])
    assert pool.fingerprint == read_records(joined).fingerprint


def test_the_fingerprint_covers_the_order(world: Path) -> None:
    """The same sources in another order are another pool."""
    assert read_records(PARTS).fingerprint != read_records(PARTS[::-1]).fingerprint


def test_names_become_the_records_source(world: Path) -> None:
    """A record's source is its name in the mapping, which allocators see; its line has no such key."""
    (world / "code" / "train.jsonl").write_text('{"prompt": "a", "completion": "b", "source": "web"}\n', "utf-8")
    pool = read_records({"maths": "gsm/train.jsonl", "code": "code/train.jsonl"})
    assert [pool.source_of(row) for row in (0, 3, 4)] == ["maths", "maths", "code"]
    assert [pool.with_source(row)["source"] for row in (0, 4)] == ["maths", "code"]
    assert json.loads(pool.line(0)) == pool[0] == GSM8K[0]
    unnamed = read_records(["gsm/train.jsonl", "code/train.jsonl"])
    assert [unnamed.source_of(row) for row in (0, 4)] == ["gsm/train.jsonl", "code/train.jsonl"]
    assert unnamed.with_source(4)["source"] == "web"


@pytest.mark.parametrize(
    ("given", "place"),
    [
        (["gsm/train.jsonl", "code/train.jsonl"], "code/train.jsonl, line 2 (row 5)"),
        ("*/train.jsonl", "code/train.jsonl, line 2 (row 1)"),
        ({"a": "gsm/train.jsonl", "b": "code/train.jsonl"}, "b: train.jsonl, line 2 (row 5)"),
        (["gsm/train.jsonl", "code"], "code: train.jsonl, line 2 (row 5)"),
        (["gsm/train.jsonl", "table.json"], "table.json, row 1 (row 5 of all)"),
    ],
)
@pytest.mark.parametrize("broken", ["[1]", '{"prompt": 1, "completion": ""}'], ids=["record", "value"])
def test_errors_name_source_file_and_row(world: Path, given: Any, place: str, broken: str) -> None:
    """A broken record, and a value that the format cannot read, are found in the one file of many that has them."""
    rows = [json.dumps(CODE[0]), broken]
    (world / "code" / "train.jsonl").write_text("\n".join(rows), "utf-8")
    (world / "table.json").write_text(f"[{', '.join(rows)}]", "utf-8")
    with pytest.raises(UserError) as error:
        encoded(read_records(given))
    assert str(error.value).startswith(f"{place}: ")


def chosen(folder: Path, given: Any, rows: list[int]) -> str:
    """The part of a selection of these rows that its readers need."""
    pool = read_records(given)
    train = {"path": given, "split": "train", "fingerprint": pool.fingerprint}
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"schema_version": 1, "data": {"train": train}}), "utf-8")
    (folder / "selected.jsonl").write_text("".join(f"{pool.line(row)}\n" for row in rows), "utf-8")
    ids = range(len(pool))
    pq.write_table(
        pa.table({"example_id": list(ids), "selected": [k in rows for k in ids]}), folder / "examples.parquet"
    )
    return str(folder)


def test_a_selection_is_a_source(world: Path) -> None:
    """Its chosen records are read as in the pool that it was made from, with their sources, capped or beside others."""
    given = {"maths": {"path": "gsm/train.jsonl", "cap": 3}, "own": OF_ITS_OWN}
    folder = chosen(world / "selection", given, [1, 3])
    whole, part = encoded(read_records(given)), encoded(read_records([folder, "code/train.jsonl"]))
    assert part.dataset["input_ids"][:2] == [whole.dataset["input_ids"][row] for row in (1, 3)]
    assert [part.records.source_of(row) for row in (0, 1)] == ["maths", "own"]
    assert len(part) == 2 + len(CODE)
    alone = read_records(folder)
    assert alone.fingerprint == read_records(f"{folder}/selected.jsonl").fingerprint
    assert len(read_records({"path": folder, "cap": 1})) == 1
    (world / "gsm" / "train.jsonl").write_text(json.dumps(GSM8K[0]), "utf-8")
    with pytest.raises(UserError, match=r"selection was made for other data"):
        read_records(folder)


def test_a_source_that_cannot_be_read_is_named(world: Path) -> None:
    """What the readers tell of a file, and what fits no format, has the source before it."""
    (world / "bad.csv").write_text("a,b\n1\n", "utf-8")
    (world / "void.jsonl").write_text("\n", "utf-8")
    cases: dict[str, Any] = {
        "x: bad.csv, line 2: 1 fields": {"x": "bad.csv", "y": "chat.jsonl"},
        "bad.csv, line 2: 1 fields": ["chat.jsonl", "bad.csv"],
        "none.jsonl does not exist": ["chat.jsonl", "none.jsonl"],
        "x: none.jsonl does not exist": {"x": "none.jsonl"},
        "void.jsonl holds no record": ["chat.jsonl", "void.jsonl"],
        "y: The columns q, a fit no format": {"x": "chat.jsonl", "y": "own.jsonl"},
    }
    for problem, given in cases.items():
        with pytest.raises(UserError) as error:
            encoded(read_records(given))
        assert str(error.value).startswith(problem)


MISTAKES: dict[str, tuple[Any, str]] = {
    "empty list": ([], r"^data\.train is an empty list"),
    "empty mapping": ({}, r"^data\.train is an empty mapping"),
    "empty list in a mapping": ({"a": []}, r"^data\.train\.a is an empty list"),
    "number": (["a", 3], r"^data\.train\[1\] is 3: give a path"),
    "list in a list": ([["a"]], r"^data\.train\[0\] is \['a'\]"),
    "name": ({"a b": "x"}, r"^data\.train names a source 'a b': use letters"),
    "number as name": ({1: "x"}, r"^data\.train names a source 1, which is not text"),
    "no path": ({"a": {"cap": 1}}, r"^data\.train\.a has no path|^data\.train\.a"),
    "unknown": ({"a": {"path": "x", "formt": "text"}}, r"a has no option 'formt', perhaps format: a source has path"),
    "path": ({"path": ["x"]}, r"^data\.train\.path is \['x'\], which is not text"),
    "format": ({"a": {"path": "x", "format": "csv"}}, r"^data\.train\.a: data\.format='csv' is not one of"),
    "contradiction": (
        [{"path": "x", "format": "text", "prompt_column": "q"}],
        r"^data\.train\[0\]: .*drop one of them",
    ),
    "template": ({"path": "x", "prompt_template": "Q:"}, r"^data\.train: .*must contain \{prompt\}"),
    "share": ({"path": "x", "share": 1.5}, r"^data\.train\.share is 1\.5; give a share above 0 and up to 1"),
    "no share": ({"path": "x", "share": 0}, r"share is 0"),
    "cap": ({"path": "x", "cap": 2.5}, r"cap is 2\.5; give a count of at least 1"),
    "truth": ({"path": "x", "cap": True}, r"cap is True"),
    "seed": ({"path": "x", "seed": -1}, r"seed is -1; give a count of at least 0"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_in_what_is_given(case: str) -> None:
    """Each is told by its place in the option, before anything is read."""
    given, problem = MISTAKES[case]
    with pytest.raises(UserError, match=problem):
        sources_of(given, "data.train")


def test_a_validation_set_is_read_whole() -> None:
    """A share or a cap of one is refused."""
    with pytest.raises(UserError, match=r"^data\.validation\.a\.cap is for data\.train alone"):
        sources_of({"path": "x", "cap": 3}, "data.validation.a", samples=False)


def test_a_mapping_of_validation_sets_stays_one() -> None:
    """Every key of the mapping names a set, ``path`` too; a list is one set."""
    assert validation_sources({"path": "x", "cap": "y"}) == {"path": "x", "cap": "y"}
    assert validation_sources(["x", "y"]) == {"validation": ["x", "y"]}


def test_paths_of_sources() -> None:
    """Every path is found and changed, and nothing else, whatever the form; the key of each is its place."""
    given = {"a": "x", "b": [{"path": "y", "prompt_template": "z{prompt}"}, "w"], "c": {"path": "v", "cap": 3}}
    assert paths_of(given) == ["x", "y", "w", "v"]
    assert paths_of(None) == []
    keyed = with_paths(given, lambda key, path: f"{key}={path}", "k")
    assert paths_of(keyed) == ["k.a=x", "k.b[0].path=y", "k.b[1]=w", "k.c.path=v"]
    assert keyed["b"][0]["prompt_template"] == "z{prompt}"
    assert described(given) == "a (x), b (y, w), c (v)"
    assert described({"path": "x"}) == described("x") == described(["x"]) == "x"
