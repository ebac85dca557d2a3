import csv
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dualsft.data.examples import encode_examples
from dualsft.data.files import SourceLine
from dualsft.data.formats import make_renderer
from dualsft.data.options import FormatOptions
from dualsft.data.reading import readings
from dualsft.data.records import build_records, read_records
from dualsft.data.texts import record_text
from dualsft.errors import UserError
from tests.world.tokenizers import CHATML, byte_level

ROWS: list[dict[str, Any]] = [
    {"prompt": "a, b", "response": "1\n2"},
    {"prompt": "é 🙂 \u2028 {x}", "response": "", "extra": None},
]


def write(folder: Path, name: str, content: str | bytes) -> str:
    """Writes a file and returns its path."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def jsonl(rows: list[dict[str, Any]], end: str = "\n") -> str:
    """Rows as JSON lines."""
    return end.join(json.dumps(row, ensure_ascii=False) for row in rows)


@pytest.mark.parametrize("name", ["pool.jsonl", "pool.ndjson", "pool.json"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    """JSON lines are read under each of their names; a U+2028 inside a string ends no line."""
    records = read_records(write(tmp_path, name, jsonl(ROWS)))
    assert list(records) == ROWS
    assert [records[row] for row in range(len(records))] == ROWS
    assert records.columns == ("prompt", "response", "extra")
    assert records.location(1) == f"{name}, line 2 (row 1)"


@pytest.mark.parametrize(
    "content",
    [json.dumps(ROWS), "\n  " + json.dumps(ROWS, indent=2), json.dumps({"data": ROWS})],
    ids=["array", "indented", "wrapped"],
)
def test_json_array(tmp_path: Path, content: str) -> None:
    """An array of objects, bare or as the only value of an object, gives one record per object."""
    records = read_records(write(tmp_path, "pool.json", content))
    assert list(records) == ROWS
    assert [json.loads(records.line(row)) for row in (0, 1)] == ROWS
    assert "\n" not in records.line(0)
    assert records.location(1) == "pool.json, row 1"


def test_a_single_conversation_is_one_record(tmp_path: Path) -> None:
    """An object whose only value is a conversation is a record, not a wrapper around records."""
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    assert list(read_records(write(tmp_path, "pool.json", json.dumps(row)))) == [row]


def test_parquet(tmp_path: Path) -> None:
    """Parquet rows keep nested values and columns; the line is their JSON."""
    rows = [{"messages": [{"role": "user", "content": "é"}], "n": 1}, {"messages": [], "n": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pool.parquet")
    records = read_records(str(tmp_path / "pool.parquet"))
    assert list(records) == rows
    assert records.line(0) == json.dumps(rows[0], ensure_ascii=False)


@pytest.mark.parametrize(("name", "comma"), [("pool.csv", ","), ("pool.tsv", "\t")])
def test_separated_values(tmp_path: Path, name: str, comma: str) -> None:
    """Fields stay text, quotes may hold separators and line ends, blank lines are skipped, fields may be long."""
    long = "x" * 300_000
    lines = [f"prompt{comma}response", "", f'"a{comma} ""b""\nc"{comma}007', "", f"{long}{comma}"]
    records = read_records(write(tmp_path, name, "\r\n".join(lines)))
    expected = [{"prompt": f'a{comma} "b"\nc', "response": "007"}, {"prompt": long, "response": ""}]
    assert list(records) == expected
    assert records.location(0) == f"{name}, line 3 (row 0)"


@pytest.mark.parametrize(("name", "comma"), [("pool.csv", ","), ("pool.tsv", "\t")])
def test_cells_that_stand_for_nothing(tmp_path: Path, name: str, comma: str) -> None:
    """What `load_dataset` takes for missing is missing, and no other cell; an empty one is an empty text."""
    cells = [
        "#N/A",
        "#NA",
        "-1.#IND",
        "-1.#QNAN",
        "-NaN",
        "-nan",
        "1.#IND",
        "1.#QNAN",
        "<NA>",
        "N/A",
        "NA",
        "NULL",
        "NaN",
        "None",
        "n/a",
        "nan",
        "null",
    ]
    cells += ["#N/A N/A", "None ", " NaN", "NAN", "Null", "none", "NaN\n", "nothing", "nil", "-", "0", "", " "]
    text = io.StringIO()
    writer = csv.writer(text, delimiter=comma)
    writer.writerows([("prompt", "response"), *(("q", cell) for cell in cells)])
    path = write(tmp_path, name, text.getvalue())
    loaded = datasets.load_dataset("csv", data_files=path, delimiter=comma, split="train", cache_dir=str(tmp_path))
    assert [row["response"] or None for row in read_records(path)] == loaded["response"][:]
    assert loaded["response"][:18] == [None] * 18
    assert [row["prompt"] for row in read_records(path)] == ["q"] * len(cells)


@pytest.mark.parametrize("cell", ["NaN", "null", "N/A", "None"])
def test_missing_cells_are_nothing_to_learn(tmp_path: Path, cell: str) -> None:
    """A row whose answer or text is such a cell is empty, and learns no word of it; as JSON's text it is text."""
    for table in (
        f"prompt,response\nq,{cell}\n",
        f"instruction,input,output\nq,{cell},{cell}\n",
        f"text,n\n{cell},1\n",
    ):
        records = read_records(write(tmp_path, "pool.csv", table))
        examples = encode_examples(records, byte_level(), FormatOptions(), 256)
        assert examples.status == ("empty",)
        assert cell not in byte_level().decode(examples.dataset[0]["input_ids"])
    for row in ({"prompt": "q", "response": cell}, {"text": cell}):
        records = read_records(write(tmp_path, "pool.jsonl", json.dumps(row)))
        assert encode_examples(records, byte_level(), FormatOptions(), 256).status == ("ok",)


def test_folder_is_read_by_name(tmp_path: Path) -> None:
    """A folder is its supported files one after the other by name; rows count through, lines do not."""
    write(tmp_path, "b.jsonl", jsonl([{"text": "2"}, {"text": "3"}]))
    write(tmp_path, "a.csv", "text\n0\n1\n")
    write(tmp_path, "README.md", "not data")
    write(tmp_path, ".hidden.jsonl", "not data")
    records = read_records(str(tmp_path))
    assert [record["text"] for record in records] == ["0", "1", "2", "3"]
    assert records.location(3) == "b.jsonl, line 2 (row 3)"


def test_lines_are_verbatim(tmp_path: Path) -> None:
    """The line of a JSON lines source is the source's, spacing, escapes and key order included, without its end."""
    lines = ['{"b":1,   "a": "\\u00e9"} ', '{ "a":"é", "b":2.50 }', '{"a":"\\ud83d\\ude42\\/"}']
    records = read_records(write(tmp_path, "pool.jsonl", "\n".join(lines)))
    assert [records.line(row) for row in range(3)] == lines


def test_bom_crlf_and_blank_lines(tmp_path: Path) -> None:
    """A BOM, CRLF and blank lines change neither records nor rows; line numbers still count every line."""
    plain = read_records(write(tmp_path, "plain.jsonl", jsonl(ROWS)))
    content = b"\xef\xbb\xbf\r\n" + "\r\n  \r\n\r\n".join(map(plain.line, (0, 1))).encode() + b"\r\n\r\n"
    dressed = read_records(write(tmp_path, "dressed.jsonl", content))
    assert list(dressed) == ROWS
    assert dressed.fingerprint == plain.fingerprint
    assert dressed.location(1) == "dressed.jsonl, line 5 (row 1)"


def test_fingerprint_follows_the_lines(tmp_path: Path) -> None:
    """The fingerprint does not depend on the file's name, and changes with a value, the order or a dropped row."""
    base = read_records(write(tmp_path, "a.jsonl", jsonl(ROWS))).fingerprint
    assert base == read_records(write(tmp_path, "b.ndjson", jsonl(ROWS))).fingerprint
    others = [ROWS[::-1], ROWS[:1], [ROWS[0], {**ROWS[1], "extra": 0}]]
    prints = {read_records(write(tmp_path, "c.jsonl", jsonl(rows))).fingerprint for rows in others}
    assert len(prints | {base}) == 4


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ('{"a": 1', "not valid JSON"),
        ("nonsense", "not valid JSON"),
        ("[1, 2]", "not list"),
        ('"text"', "not str"),
        ("null", "not NoneType"),
    ],
)
def test_broken_row(tmp_path: Path, broken: str, reason: str) -> None:
    """A row that is no JSON object stops the reading with its file, line, row and the reason."""
    path = write(tmp_path, "pool.jsonl", f'{{"a": 0}}\n\n{broken}\n')
    with pytest.raises(UserError, match=rf"pool\.jsonl, line 3 \(row 1\).*{reason}"):
        read_records(path)


def test_broken_row_in_a_folder_counts_through(tmp_path: Path) -> None:
    """The row of an error is the one the example would have had; the line is its own file's."""
    write(tmp_path, "a.jsonl", '{"a": 0}\n{"a": 1}\n')
    write(tmp_path, "b.jsonl", "{\n")
    with pytest.raises(UserError, match=r"b\.jsonl, line 1 \(row 2\)"):
        read_records(str(tmp_path))


def test_broken_array(tmp_path: Path) -> None:
    """A broken JSON array names the line at which the parser stopped; an array of the wrong things names the row."""
    with pytest.raises(UserError, match=r"pool\.json, line 2: not valid JSON"):
        read_records(write(tmp_path, "pool.json", '[{"a": 1},\n{"a" 2}]'))
    with pytest.raises(UserError, match=r"pool\.json, row 1: .*not int"):
        read_records(write(tmp_path, "pool.json", '[{"a": 1}, 2]'))


def test_lone_surrogates_survive(tmp_path: Path) -> None:
    """Half a character, which UTF-8 cannot hold, stays escaped in the line instead of breaking it."""
    records = read_records(write(tmp_path, "pool.json", '[{"a": "\\ud83d"}]'))
    assert records.line(0) == '{"a": "\\ud83d"}'


@pytest.mark.parametrize("name", ["pool.jsonl", "pool.json", "pool.csv"])
def test_not_utf8(tmp_path: Path, name: str) -> None:
    """Bytes that are not UTF-8 are refused with line and position."""
    with pytest.raises(UserError, match=rf"{name}, line 2, byte 3 of the line: not UTF-8"):
        read_records(write(tmp_path, name, b"{}\ncd\xe9f\n"))


@pytest.mark.parametrize(("row", "line"), [("1,2,3", 3), ("1", 3)])
def test_ragged_csv(tmp_path: Path, row: str, line: int) -> None:
    """A row with more or fewer fields than the header is refused, not padded."""
    with pytest.raises(UserError, match=rf"pool\.csv, line {line}: \d fields where the header names 2"):
        read_records(write(tmp_path, "pool.csv", f"a,b\n1,2\n{row}\n"))


def test_unreadable_sources(tmp_path: Path) -> None:
    """Missing, empty and foreign sources each have their own sentence."""
    with pytest.raises(UserError, match=r"missing\.jsonl does not exist"):
        read_records(str(tmp_path / "missing.jsonl"))
    with pytest.raises(UserError, match=r"missing\.jsonl does not exist"):
        read_records("missing.jsonl")
    with pytest.raises(UserError, match="is an empty text"):
        read_records("")
    with pytest.raises(UserError, match="holds no record"):
        read_records(write(tmp_path, "empty.jsonl", "\n \n"))
    with pytest.raises(UserError, match="holds no record"):
        read_records(write(tmp_path, "empty.json", "[]"))
    with pytest.raises(UserError, match=r"pool\.xlsx is not a kind of file"):
        read_records(write(tmp_path, "pool.xlsx", "x"))
    with pytest.raises(UserError, match=r"bad\.parquet cannot be read as Parquet"):
        read_records(write(tmp_path, "bad.parquet", "x"))
    (tmp_path / "void").mkdir()
    with pytest.raises(UserError, match=r"void holds no \.jsonl"):
        read_records(str(tmp_path / "void"))


def test_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no file but looks like a dataset id is loaded from the hub, with the split asked for."""
    asked = []

    def load_dataset(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.Dataset.from_list(ROWS[:1])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    records = read_records("someone/some-data_v1.5", "test")
    assert asked == [("someone/some-data_v1.5", "test")]
    assert list(records) == ROWS[:1]
    assert records.location(0) == "someone/some-data_v1.5 [test], row 0"


def test_hub_failure_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the hub's client raises becomes one sentence with its first line."""

    def load_dataset(name: str, split: str) -> datasets.Dataset:
        raise ConnectionError("no network\nand much more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("dualsft.storage.hub.is_reachable", lambda: True)
    with pytest.raises(UserError, match=r"nor a Hugging Face dataset that can be loaded .*no network$"):
        read_records("someone/nothing")


TURNS = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}]

TEXTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "prompt": ({"prompt": "one two", "response": "three"}, {}, "one two\nthree"),
    "number": ({"prompt": "one", "completion": 7}, {}, "one\n7"),
    "null": ({"prompt": "one", "completion": None}, {}, "one"),
    "named": ({"q": "one", "a": "two"}, {"prompt_column": "q", "response_column": "a"}, "one\ntwo"),
    "alpaca": ({"output": "three", "instruction": "one", "input": "two"}, {}, "one\ntwo\nthree"),
    "no input": ({"output": "three", "instruction": "one"}, {}, "one\nthree"),
    "text": ({"text": "one\ntwo"}, {}, "one\ntwo"),
    "messages": ({"messages": TURNS}, {}, "one two\nthree"),
    "messages elsewhere": ({"turns": TURNS}, {"messages_column": "turns"}, "one two\nthree"),
    "dialogue": ({"completion": TURNS[1:], "prompt": TURNS[:1]}, {}, "one two\nthree"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_the_text_is_what_the_format_reads(case: str) -> None:
    """Prompt before response, whatever the record's order, without bookkeeping and without who speaks."""
    row, options, expected = TEXTS[case]
    bookkeeping = {"id": 7, "source": "s", **row}
    assert record_text(bookkeeping, FormatOptions(**options).text_columns(tuple(bookkeeping))) == expected


@pytest.mark.parametrize("case", TEXTS)
def test_other_columns_do_not_matter_to_the_renderer_either(case: str) -> None:
    """A record without all other columns renders to the same text, which holds every word of it."""
    row, options, expected = TEXTS[case]
    rendered = []
    for one in (row, {"id": 7, "source": "s", **row}):
        records = build_records([SourceLine(json.dumps(one), "pool.jsonl", 1)])
        (reading,) = readings(records, FormatOptions(**options))
        rendered.append(make_renderer(reading, records[0], byte_level(CHATML))(records[0], "here"))
    assert rendered[0] == rendered[1]
    assert all(line in rendered[0].text for line in expected.split("\n"))
