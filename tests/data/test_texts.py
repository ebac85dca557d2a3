import json
from typing import Any

import pytest

from dualsft.data import FormatOptions, record_text
from dualsft.data.files import SourceLine
from dualsft.data.formats import make_renderer
from dualsft.data.records import build_records

from .tiny_tokenizers import CHATML, byte_level

TURNS = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}]

CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
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


@pytest.mark.parametrize("case", CASES)
def test_the_text_is_what_the_format_reads(case: str) -> None:
    """Prompt before response, whatever the record's order, without bookkeeping and without who speaks."""
    row, options, expected = CASES[case]
    bookkeeping = {"id": 7, "source": "s", **row}
    assert record_text(bookkeeping, FormatOptions(**options).text_columns(tuple(bookkeeping))) == expected


@pytest.mark.parametrize("case", CASES)
def test_other_columns_do_not_matter_to_the_renderer_either(case: str) -> None:
    """A record without all other columns renders to the same text, which holds every word of it."""
    row, options, expected = CASES[case]
    rendered = []
    for one in (row, {"id": 7, "source": "s", **row}):
        records = build_records([SourceLine(json.dumps(one), "pool.jsonl", 1)])
        rendered.append(make_renderer(records, byte_level(CHATML), FormatOptions(**options))(records[0], "here"))
    assert rendered[0] == rendered[1]
    assert all(line in rendered[0].text for line in expected.split("\n"))
