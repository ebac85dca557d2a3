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
from tests.world.tokenizers import CHATML, byte_level

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "weight": 1}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
SOUND: list[list[dict[str, Any]]] = [
    [{"prompt": "2 + 2", "response": "4"}, {"prompt": "3 + 3", "response": None}],
    [{"instruction": "Add.", "input": "2, 2", "output": "4"}, {"instruction": "Sum", "input": "", "output": "5"}],
    [{"text": "A text."}, {"text": "<bos>Another.<eos>"}],
    [{"messages": TURNS}, {"messages": [TURNS[0], CALL], "tools": [{"type": "function", "function": {"name": "add"}}]}],
    [{"conversations": TURNS}, {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]}],
    [{"prompt": TURNS[:1], "response": TURNS[1:]}],
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"messages_column": "conversations"},
    {"prompt_column": "prompt", "response_column": "response"},
    {"prompt_template": "{prompt}"},
]
KINDS = ("jsonl", "json", "csv", "tsv", "parquet")


def _file(kind: str, records: Any) -> bytes:
    """The records as a file of this kind; as JSON lines where the kind cannot hold them."""
    rows = records if isinstance(records, list) else [records]
    if kind == "json":
        return json.dumps(records).encode()
    if kind in ("csv", "tsv") and all(isinstance(row, dict) for row in rows):
        text = io.StringIO()
        writer = csv.writer(text, delimiter="," if kind == "csv" else "\t")
        writer.writerows([list(rows[0]) if rows else [], *(row.values() for row in rows)])
        return text.getvalue().encode(errors="surrogatepass")
    if kind == "parquet":
        try:
            stream = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(rows), stream)
        except (pa.ArrowException, AttributeError, TypeError, ValueError, OverflowError, UnicodeError):
            pass
        else:
            return stream.getvalue()
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@st.composite
def _cases(draw: DrawFn) -> tuple[str, bytes, dict[str, Any]]:
    kind = draw(st.sampled_from(KINDS))
    sound = draw(st.sampled_from(SOUND))
    records = draw(st.one_of(st.just(sound), changed(sound, most=1), changed(sound), st.lists(VALUES, max_size=3)))
    data = _file(kind, records)
    if draw(st.integers(0, 3)) == 0:
        data = draw(changed_bytes(data))
    return kind, data, draw(st.sampled_from(OPTIONS))


TOKENIZER = byte_level(CHATML)


def _read(case: tuple[str, bytes, dict[str, Any]], folder: Path) -> None:
    kind, data, options = case
    path = folder / f"pool.{kind}"
    path.write_bytes(data)
    load_examples(str(path), TOKENIZER, max_length=64, **options)


RECORDS = Fuzzer(_cases(), _read)
