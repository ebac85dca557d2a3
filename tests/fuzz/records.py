"""Records: files of every kind, with and without damage, of every format."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from dualsft import load_examples
from tests.fuzz.changes import VALUES, changed, changed_bytes
from tests.fuzz.harness import Fuzzer
from tests.world.templates import HERMES
from tests.world.tokenizers import byte_level

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "weight": 1}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
TOOLS = [{"type": "function", "function": {"name": "add"}}]
SHARED = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"messages_column": "conversations"},
    {"prompt_column": "prompt", "response_column": "response"},
    {"prompt_template": "{prompt}"},
]
SOUND: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
    ([{"prompt": "2 + 2", "response": "4"}, {"prompt": "3 + 3", "response": None}], OPTIONS[2]),
    ([{"instruction": "Add.", "input": "2, 2", "output": "4"}, {"instruction": "Sum", "input": "", "output": "5"}], {}),
    ([{"instruction": "Add.", "output": "4", "system": "Be brief.", "history": [["Sum", "5"], ["Say", "6"]]}], {}),
    ([{"text": "A text."}, {"text": "<bos>Another.<eos>"}], {}),
    ([{"messages": TURNS}, {"messages": [TURNS[0], CALL], "tools": TOOLS}], {}),
    ([{"conversations": TURNS}, {"conversations": SHARED}], OPTIONS[1]),
    ([{"messages": json.dumps(TURNS), "system": "Be brief."}], {}),
    ([{"prompt": TURNS[:1], "response": TURNS[1:]}], {}),
    ([{"prompt": "2 + 2", "completion": "4"}], OPTIONS[3]),
]
"""Records, and options that read them."""
KINDS = ("jsonl", "json", "csv", "tsv", "parquet")


def _file(kind: str, records: Any) -> tuple[str, bytes]:
    """The records as a file of this kind, and the kind; as JSON lines where the kind cannot hold them."""
    rows = records if isinstance(records, list) else [records]
    if kind == "json":
        return kind, json.dumps(records).encode()
    if kind in ("csv", "tsv") and all(isinstance(row, dict) and not _is_nested(row) for row in rows):
        text = io.StringIO()
        columns = dict.fromkeys(column for row in rows for column in row)
        writer = csv.DictWriter(text, columns, delimiter="," if kind == "csv" else "\t")
        writer.writeheader()
        writer.writerows(rows)
        return kind, text.getvalue().encode(errors="surrogatepass")
    if kind == "parquet":
        try:
            stream = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(rows), stream)
        except (pa.ArrowException, AttributeError, TypeError, ValueError, OverflowError, UnicodeError):
            pass
        else:
            return kind, stream.getvalue()
    return "jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode()


def _is_nested(row: dict[str, Any]) -> bool:
    return any(isinstance(value, (dict, list)) for value in row.values())


@st.composite
def _cases(draw: DrawFn) -> tuple[str, bytes, dict[str, Any]]:
    sound, options = draw(st.sampled_from(SOUND))
    records = draw(st.one_of(*[changed(sound, most=1)] * 3, changed(sound), st.lists(VALUES, min_size=1, max_size=3)))
    kind, data = _file(draw(st.sampled_from(KINDS)), records)
    if draw(st.integers(0, 7)) == 0:
        data = draw(changed_bytes(data))
    return kind, data, draw(st.sampled_from([*[options] * 6, *OPTIONS]))


TOKENIZER = byte_level(HERMES)


def _read(case: tuple[str, bytes, dict[str, Any]], folder: Path) -> None:
    kind, data, options = case
    path = folder / f"pool.{kind}"
    path.write_bytes(data)
    load_examples(str(path), TOKENIZER, max_length=64, **options)


RECORDS = Fuzzer(_cases(), _read)
