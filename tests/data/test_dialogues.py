import json
from pathlib import Path
from typing import Any

import pytest

from dualsft.data.examples import encode_examples
from dualsft.data.options import FormatOptions
from dualsft.data.records import read_records
from dualsft.data.texts import record_text
from dualsft.errors import UserError
from tests.data.test_chat import SHAREGPT, TOOLS
from tests.data.test_formats import NAN, learnt, render, turns
from tests.world import templates
from tests.world.data import write_jsonl
from tests.world.tokenizers import CHATML, STRICT, byte_level

CHAT = byte_level(CHATML)
QUESTION, ANSWER = turns("q"), [{"role": "assistant", "content": "new"}]
MIXED = r"pool\.jsonl, line {} \(row {}\): '{}' is {}, but others of the prompts and responses are {}; write all"


@pytest.mark.parametrize("value", [turns("a", "b"), SHAREGPT])
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_a_system_column_beside_turns(column: str, value: list[dict[str, str]]) -> None:
    """Its text is the system's turn, of every form of conversation."""
    [one] = render({column: value, "system": "s"}, tokenizer=CHAT)
    assert one == render({"messages": [{"role": "system", "content": "s"}, *turns("a", "b")]}, tokenizer=CHAT)[0]


def test_a_system_column_beside_a_prompt_of_turns() -> None:
    """It comes before the prompt, and is not learnt."""
    [one] = render({"prompt": QUESTION, "completion": ANSWER, "system": "s"}, tokenizer=CHAT)
    assert one.text.startswith("<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq")
    assert learnt(one) == ["new<|im_end|>\n"]


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_turn_goes_before_the_column(role: str) -> None:
    """Of two system prompts the conversation's own is the one that is read."""
    messages = [{"role": role, "content": "own"}, *turns("a", "b")]
    assert render({"messages": messages, "system": "s"}, tokenizer=CHAT) == render(
        {"messages": messages}, tokenizer=CHAT
    )


@pytest.mark.parametrize("nothing", [None, "", " ", NAN])
def test_no_system(nothing: Any) -> None:
    """A blank or missing one makes no turn."""
    row = {"messages": turns("a", "b")}
    assert render({**row, "system": nothing}, tokenizer=CHAT) == render(row, tokenizer=CHAT)


def test_systems_that_cannot_be_written() -> None:
    """What is no text, and a template that knows no system, are refused and not passed over."""
    with pytest.raises(UserError, match=r"row 0.*'system' must be text, not dict"):
        render({"messages": turns("a", "b"), "system": {"content": "s"}}, tokenizer=CHAT)
    with pytest.raises(UserError, match="refuses the conversation"):
        render({"messages": turns("a", "b"), "system": "s"}, tokenizer=byte_level(STRICT))


def test_systems_that_are_not_written(tmp_path: Path) -> None:
    """A template that passes over the system's turn is told, whether it is a column or a turn; a trimmed one is not."""
    loop = "{% for m in messages %}{% if m.role != 'system' %}"
    template = CHATML.replace("{% for m in messages %}", loop).replace("{% endfor %}", "{% endif %}{% endfor %}")
    trimming = CHATML.replace("m.content", "m.content | trim")
    system = {"role": "system", "content": " Be brief. "}
    for row in ({"messages": turns("a", "b"), "system": " Be brief. "}, {"messages": [system, *turns("a", "b")]}):
        records = read_records(write_jsonl(tmp_path / "pool.jsonl", [row]))
        [remark] = encode_examples(records, byte_level(template), FormatOptions(), 256).remarks
        assert "the chat template does not write what the system says" in remark
        for sound in (CHATML, trimming):
            assert encode_examples(records, byte_level(sound), FormatOptions(), 256).remarks == ()


@pytest.mark.parametrize("column", ["messages", "conversations", "conversation"])
@pytest.mark.parametrize("value", [turns("a", "b"), SHAREGPT])
def test_conversations_as_json_text(column: str, value: list[dict[str, str]]) -> None:
    """A column that holds a conversation as JSON text, as CSV must, is read as the list, and compared as it."""
    row = {column: json.dumps(value, indent=1)}
    assert render(row, tokenizer=CHAT) == render({"messages": turns("a", "b")}, tokenizer=CHAT)
    assert record_text(row, (column,)) == "a\nb"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[{'role': 'user', 'content': 'a'}]", "this text is not valid JSON .*json.dumps"),
        ('[{"role": "user", "content": "a"}', "this text is not valid JSON"),
        ('[{"role": "user", "role": "assistant"}]', "two values under the key 'role'"),
        ("", "this text is not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"role": "user", "content": "a"}', "must be a list of {role, content}"),
        ("[]", "must be a list of {role, content}"),
        ('["a"]', "turn 0: a turn must be an object"),
    ],
)
def test_texts_that_are_no_conversation(text: str, reason: str) -> None:
    """Python's own notation, text that is cut off and JSON of something else are refused by file, line and row."""
    with pytest.raises(UserError, match=rf"pool\.jsonl, line 1 \(row 0\).*{reason}"):
        render({"messages": text}, tokenizer=CHAT)


def test_prompt_and_completion_as_json_text() -> None:
    """Both as JSON text are turns as lists are; one of them alone is text, as before."""
    [one] = render({"prompt": json.dumps(QUESTION), "completion": json.dumps(ANSWER)}, tokenizer=CHAT)
    assert one == render({"prompt": QUESTION, "completion": ANSWER}, tokenizer=CHAT)[0]
    for row in (
        {"prompt": "Make turns.", "completion": json.dumps(ANSWER)},
        {"prompt": json.dumps(QUESTION), "completion": "x"},
    ):
        [two] = render(row, tokenizer=CHAT)
        assert learnt(two) == [row["completion"]]


@pytest.mark.parametrize(
    ("rows", "place", "what"),
    [
        ([{"prompt": QUESTION, "completion": "new"}], (1, 0), ("completion", "text", "a list of messages")),
        ([{"prompt": "q", "response": ANSWER}], (1, 0), ("response", "a list of messages", "text")),
        (
            [{"prompt": QUESTION, "completion": ANSWER}, {"prompt": "q", "completion": "new"}],
            (2, 1),
            ("prompt", "text", "a list of messages"),
        ),
        (
            [{"prompt": "q", "completion": "new"}, {"prompt": QUESTION, "completion": ANSWER}],
            (2, 1),
            ("prompt", "a list of messages", "text"),
        ),
        ([{"prompt": SHAREGPT[:1], "completion": "new"}], (1, 0), ("completion", "text", "a list of messages")),
    ],
)
def test_turns_and_text_in_one_pool(
    rows: list[dict[str, Any]], place: tuple[int, int], what: tuple[str, str, str]
) -> None:
    """A prompt and a completion of different kinds, in one record or in several, are told apart in one sentence."""
    with pytest.raises(UserError, match=MIXED.format(*place, *what)):
        render(*rows, tokenizer=CHAT)


@pytest.mark.parametrize("nothing", [None, NAN])
def test_a_missing_completion(nothing: Any) -> None:
    """It leaves nothing to learn, as a missing response of text does."""
    [one] = render({"prompt": QUESTION, "completion": nothing}, tokenizer=CHAT)
    assert one.spans == ()
    assert "q" in one.text


def test_answers_of_turns_in_two_columns() -> None:
    """Of two sources joined each record has its own, and two different ones are refused."""
    other = [{"role": "assistant", "content": "other"}]
    rows = [{"response": None, "completion": ANSWER}, {"response": other, "completion": None}]
    found = render(*({"prompt": QUESTION, **row} for row in rows), tokenizer=CHAT)
    assert [learnt(one) for one in found] == [["new<|im_end|>\n"], ["other<|im_end|>\n"]]
    with pytest.raises(UserError, match="'response' and 'completion' hold different answers"):
        render({"prompt": QUESTION, "response": other, "completion": ANSWER}, tokenizer=CHAT)


@pytest.mark.parametrize("row", [{"messages": turns("a", "b")}, {"prompt": QUESTION, "completion": ANSWER}])
def test_columns_beside_turns(row: dict[str, Any], tmp_path: Path) -> None:
    """A system prompt and tools are read, and what is not is told."""
    path = write_jsonl(tmp_path / "pool.jsonl", [{**row, "system": "s", "tools": TOOLS, "history": []}])
    examples = encode_examples(read_records(path), byte_level(templates.HERMES), FormatOptions(), 256)
    assert examples.remarks == ("pool.jsonl: the column history is no part of the text that is learnt from.",)
