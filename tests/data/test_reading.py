"""How each file's records are read."""

from pathlib import Path
from typing import Any

import pytest

from dualsft.data.examples import encode_examples
from dualsft.data.options import FormatOptions
from dualsft.data.reading import readings, text_reader
from dualsft.data.records import read_records
from tests.world.data import write_jsonl
from tests.world.tokenizers import CHATML, byte_level


@pytest.fixture
def pool(tmp_path: Path) -> dict[str, Any]:
    """Three named sources: a usual pair, a conversation, and columns that the source names."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows: dict[str, dict[str, Any]] = {
        "maths": {"id": 1, "question": "2 + 2?", "answer": "4"},
        "chat": {"messages": turns, "id": 2},
        "own": {"q": "3 + 3?", "a": "6", "text": "no part"},
    }
    paths = {name: write_jsonl(tmp_path / f"{name}.jsonl", [row]) for name, row in rows.items()}
    return {**paths, "own": {"path": paths["own"], "prompt_column": "q", "response_column": "a"}}


def test_texts_are_of_the_columns_that_are_read(pool: dict[str, Any]) -> None:
    """What near-duplicates are found by is each record's own prompt and response."""
    records = read_records(pool)
    text = text_reader(records, FormatOptions())
    assert [text(row) for row in range(3)] == ["2 + 2?\n4", "Hi\nHello", "3 + 3?\n6"]
    assert [reading.format for reading in readings(records, FormatOptions())] == [
        "prompt_response",
        "messages",
        "prompt_response",
    ]


def test_columns_that_are_not_read_are_told_by_source(pool: dict[str, Any]) -> None:
    """Sources with the same ones share a sentence."""
    remarks = encode_examples(read_records(pool), byte_level(CHATML), FormatOptions(), 64).remarks
    assert [remark for remark in remarks if "column" in remark] == [
        "maths, chat: the column id is no part of the text that is learnt from.",
        "own: the column text is no part of the text that is learnt from.",
    ]


def test_what_a_source_says_of_itself_replaces_what_data_says() -> None:
    """Columns of ``data`` are not those of a source with its own; a template holds until the source has another."""
    options = FormatOptions(prompt_column="x", prompt_template="{prompt}: ")
    assert options.within({}) == options
    assert options.within({"format": "alpaca"}) == FormatOptions("alpaca", prompt_template="{prompt}: ")
    assert options.within({"prompt_template": "{prompt}"}) == FormatOptions(
        prompt_column="x", prompt_template="{prompt}"
    )
