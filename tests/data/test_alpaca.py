import json
from pathlib import Path
from typing import Any

import pytest

from dualsft.data.examples import encode_examples, load_examples
from dualsft.data.options import FormatOptions
from dualsft.data.records import read_records
from dualsft.data.texts import record_text
from dualsft.errors import UserError
from tests.data.test_formats import learnt, render
from tests.world.data import write_jsonl
from tests.world.tokenizers import byte_level

ROW = {"instruction": "c", "output": "d"}
PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


def section(instruction: str) -> str:
    """The text of an instruction, up to its response."""
    return f"### Instruction:\n{instruction}\n\n### Response:\n"


@pytest.mark.parametrize("history", [[["a", "b"]], '[["a", "b"]]'])
def test_history(history: Any) -> None:
    """Earlier turns stand before the instruction as they were learnt once, and their responses are learnt again."""
    [one] = render({**ROW, "history": history})
    assert one.text == f"{PREAMBLE}\n\n{section('a')}b<eos>\n\n{section('c')}d"
    assert learnt(one) == ["b<eos>", "d"]


def test_the_tokens_of_a_history(tmp_path: Path) -> None:
    """Each response is learnt with the end-of-sequence token, which is one id within the text too."""
    tokenizer = byte_level()
    path = write_jsonl(tmp_path / "pool.jsonl", [{**ROW, "history": [["a", "b"], ["x", " "]]}])
    example = load_examples(path, tokenizer)[0]
    labels = [label for label in example["labels"] if label != -100]
    assert tokenizer.decode(labels) == "b<eos>d<eos>"
    assert example["input_ids"].count(tokenizer.eos_token_id) == 3


def test_a_blank_output_behind_a_history() -> None:
    """An example whose own response is blank is empty, as without a history."""
    [one] = render({**ROW, "output": None, "history": [["a", "b"]]})
    assert one.spans == ()


@pytest.mark.parametrize("nothing", [None, [], "", "[]", float("nan")])
def test_no_history_and_no_system(nothing: Any) -> None:
    """Missing and empty ones change nothing."""
    assert render({**ROW, "history": nothing}) == render(ROW)
    assert render({**ROW, "system": nothing if nothing in ("", None) else " "}) == render(ROW)


@pytest.mark.parametrize(
    "history", ["a", "[['a', 'b']]", {"a": "b"}, [["a"]], [["a", None]], [["a", "b", "c"]], ["ab"], 3]
)
def test_histories_that_cannot_be_read(history: Any) -> None:
    """Anything but pairs of texts is refused, with its place and the way out."""
    with pytest.raises(UserError, match=r"pool\.jsonl, line 1 \(row 0\): 'history' must be a list of pairs.*remove"):
        render({**ROW, "history": history})


def test_the_system_column() -> None:
    """A system prompt takes the place of the preamble, with an input and without, and is not learnt."""
    [one] = render({**ROW, "system": "Be brief."})
    assert (one.text, learnt(one)) == (f"Be brief.\n\n{section('c')}d", ["d"])
    [two] = render({**ROW, "input": "i", "system": "Be brief."})
    assert two.text == "Be brief.\n\n### Instruction:\nc\n\n### Input:\ni\n\n### Response:\nd"
    with pytest.raises(UserError, match="'system' must be text, not list"):
        render({**ROW, "system": ["Be brief."]})


def test_rows_with_other_histories_are_other_texts() -> None:
    """The history is part of the text by which rows are compared."""
    columns = FormatOptions().text_columns(("output", "instruction", "history"))
    assert record_text({**ROW, "history": [["a", "b"]]}, columns) == "a\nb\nc\nd"


ALPACA = {"instruction": "a", "output": "b"}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "a", "response": "b", "input": "c"}, "pool.jsonl: the column input is no part of the text"),
        ({"prompt": "a", "response": "b", "system": "c", "history": []}, "the columns system, history are no part"),
        ({**ALPACA, "system": "s", "history": [], "tools": "[]"}, "the column tools is no part"),
        ({"text": "a", **{f"c{i}": i for i in range(9)}}, "the columns c0, c1, c2, c3 and 5 more are no part"),
        ({"text": "a", "x" * 5000: 1}, "pool.jsonl: the column xxx"),
    ],
)
def test_columns_that_are_not_read(row: dict[str, Any], told: str, tmp_path: Path) -> None:
    """They are told once for all rows, in one short sentence."""
    rows = [row, {**row, "prompt": "z"}] if "prompt" in row else [row]
    records = read_records(write_jsonl(tmp_path / "pool.jsonl", rows))
    [remark] = encode_examples(records, byte_level(), FormatOptions(), 64).remarks
    assert told in remark
    assert len(remark) < 1000


def test_columns_that_are_read_are_not_told(tmp_path: Path) -> None:
    """Nothing is said of what has a part in the text, whatever the format."""
    rows = [{**ALPACA, "input": "i", "system": "s", "history": json.dumps([["a", "b"]])}]
    path = write_jsonl(tmp_path / "pool.jsonl", rows)
    assert encode_examples(read_records(path), byte_level(), FormatOptions(), 64).remarks == ()
