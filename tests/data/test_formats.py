import json
from typing import Any

import pytest
from jaxtyping import TypeCheckError
from transformers import PreTrainedTokenizerBase

from dualsft.data.files import SourceLine
from dualsft.data.formats import Rendered, make_renderer
from dualsft.data.options import FormatOptions
from dualsft.data.reading import readings
from dualsft.data.records import build_records
from dualsft.errors import UserError
from tests.world.tokenizers import CHATML, FORGETFUL, RESTLESS, STRICT, byte_level


def render(*rows: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None = None, **options: Any) -> list[Rendered]:
    """Renders rows as a JSON lines pool."""
    lines = [SourceLine(json.dumps(row), "pool.jsonl", number) for number, row in enumerate(rows, start=1)]
    records = build_records(lines)
    (reading,) = readings(records, FormatOptions(**options))
    function = make_renderer(reading, records[0], tokenizer or byte_level())
    return [function(record, records.location(row)) for row, record in enumerate(records)]


def learnt(rendered: Rendered) -> list[str]:
    """The supervised pieces of the text."""
    return [rendered.text[start:end] for start, end in rendered.spans]


def turns(*contents: str) -> list[dict[str, str]]:
    """Turns of user and assistant by turns."""
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(contents)]


@pytest.mark.parametrize("response", ["response", "completion"])
def test_prompt_response(response: str) -> None:
    """The response alone is learnt, behind a prompt whose braces are left alone."""
    [one] = render({"prompt": "f{prompt}{0}", response: " two "})
    assert one == Rendered("f{prompt}{0}\n two ", ((13, 18),), add_eos=True)


def test_named_columns_and_template() -> None:
    """Naming a column implies prompt and response, over every other recognition; the template goes around prompts."""
    row = {"question": "Q?", "answer": "A.", "text": "x", "messages": []}
    [one] = render(row, prompt_column="question", response_column="answer", prompt_template="<{prompt}> ")
    assert (one.text, learnt(one)) == ("<Q?> A.", ["A."])
    [two] = render({"question": "Q?", "completion": "C"}, prompt_column="question")
    assert learnt(two) == ["C"]


def test_alpaca() -> None:
    """Both Alpaca prompts are written to the letter, and values that look like placeholders stay as they are."""
    row = {"instruction": "Add {input}.", "input": "{instruction}", "output": "3"}
    with_input, without, null = render(row, {**row, "input": ""}, {**row, "input": None})
    assert with_input.text == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd {input}.\n\n### Input:\n"
        "{instruction}\n\n### Response:\n3"
    )
    assert without.text == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd {input}.\n\n### Response:\n3"
    )
    assert null == without
    assert learnt(with_input) == learnt(without) == ["3"]


def test_text() -> None:
    """Plain text is learnt in full."""
    [one] = render({"text": "a b"})
    assert one == Rendered("a b", ((0, 3),), add_eos=True)
    [two] = render({"body": "a"}, format="text", text_column="body")
    assert learnt(two) == ["a"]


def test_every_assistant_turn() -> None:
    """Each assistant turn is learnt with its end-of-turn marker; no other turn is."""
    row = {"messages": [{"role": "system", "content": "s"}, *turns("same", "same", "q", "b")]}
    [one] = render(row, tokenizer=byte_level(CHATML))
    assert learnt(one) == ["same<|im_end|>\n", "b<|im_end|>\n"]
    assert one.text[: one.spans[0][0]].endswith("same<|im_end|>\n<|im_start|>assistant\n")
    assert not one.add_eos


def test_template_that_rewrites_earlier_turns() -> None:
    """A turn that is written otherwise once others follow is learnt as it stands in the whole conversation."""
    thought = "<think>\nhm\n</think>\n\n b "
    row = {"messages": turns("x", " a ", "y", thought, "z", "c")}
    [one] = render(row, tokenizer=byte_level(FORGETFUL))
    assert learnt(one) == ["a<|im_end|>\n", "b<|im_end|>\n", "<think>\n</think>\n\nc<|im_end|>\n"]
    assert "hm" not in one.text


def test_repeated_contents_are_told_apart() -> None:
    """A turn is looked for from its own start on, so equal contents elsewhere do not mislead."""
    [one] = render({"messages": turns("a", "a", "a", "a")}, tokenizer=byte_level(FORGETFUL))
    first, second = one.spans
    assert learnt(one) == ["a<|im_end|>\n", "<think>\n</think>\n\na<|im_end|>\n"]
    assert first[1] < second[0]


def test_dialogue_in_prompt_and_completion() -> None:
    """Message lists as prompt and completion are one conversation of which only the completion is learnt."""
    row = {"prompt": turns("q", "old", "r"), "completion": [{"role": "assistant", "content": "new"}]}
    [one] = render(row, tokenizer=byte_level(CHATML))
    assert learnt(one) == ["new<|im_end|>\n"]
    assert "old" in one.text


@pytest.mark.parametrize("response", ["", " \n\t", None])
def test_blank_response(response: str | None) -> None:
    """A blank response leaves nothing to learn, in a conversation as elsewhere."""
    [one] = render({"prompt": "q", "response": response})
    assert one.spans == ()
    row = {"messages": [*turns("q"), {"role": "assistant", "content": response}, *turns("r", "s")]}
    [two] = render(row, tokenizer=byte_level(CHATML))
    assert learnt(two) == ["s<|im_end|>\n"]


def test_numbers_as_responses() -> None:
    """A number as a response is written out."""
    assert [learnt(one) for one in render(*[{"prompt": "q", "response": n} for n in (7, 0.5, 0)])] == [
        ["7"],
        ["0.5"],
        ["0"],
    ]


def test_truth_values_as_responses() -> None:
    """A truth value as a response is written as in JSON."""
    assert [learnt(one) for one in render(*[{"prompt": "q", "response": b} for b in (True, False)])] == [
        ["true"],
        ["false"],
    ]


NAN = float("nan")


@pytest.mark.parametrize(
    ("row", "spans"),
    [
        ({"prompt": "q", "response": NAN}, []),
        ({"instruction": "q", "input": NAN, "output": "a"}, ["a"]),
        ({"instruction": "q", "output": NAN}, []),
        ({"messages": [*turns("q"), {"role": "assistant", "content": NAN}]}, []),
    ],
)
def test_missing_values(row: dict[str, Any], spans: list[str]) -> None:
    """NaN, as pandas writes what is missing, is missing as null is."""
    [one] = render(row, tokenizer=byte_level(CHATML))
    assert learnt(one) == spans
    assert "nan" not in one.text


@pytest.mark.parametrize(
    ("rows", "spans"),
    [
        ([{"response": "A", "completion": None}, {"response": None, "completion": "B"}], ["A", "B"]),
        ([{"response": "A"}, {"completion": "B"}], ["A", "B"]),
        ([{"response": "A", "completion": ""}, {"response": NAN, "completion": "B"}], ["A", "B"]),
        ([{"response": "A", "completion": "A"}, {"response": 7, "completion": None}], ["A", "7"]),
    ],
)
def test_answers_in_two_columns(rows: list[dict[str, Any]], spans: list[str]) -> None:
    """Of two sources joined, each with its answers in a column of its own, each record has its answer."""
    assert [text for one in render(*({"prompt": "q", **row} for row in rows)) for text in learnt(one)] == spans


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "response": "A", "completion": "B"}, "'response' and 'completion' hold different answers"),
        ({"prompt": "q", "response": None, "output": "B"}, "'response' holds no answer but 'output' does"),
        ({"instruction": "q", "output": "", "response": "B"}, "'output' holds no answer but 'response' does"),
    ],
)
def test_answers_that_contradict(row: dict[str, Any], reason: str) -> None:
    """Two different answers, or one in a column that is not read, are refused until the column is named."""
    with pytest.raises(UserError, match=rf"pool\.jsonl, line 1 \(row 0\): {reason}.*name.*data\.response_column"):
        render(row)
    prompt = "prompt" if "prompt" in row else "instruction"
    [one] = render(row, prompt_column=prompt, response_column=list(row)[2])
    assert learnt(one) == ["B"]


def test_parts_as_texts() -> None:
    """A list of text parts is the text that they make, wherever a text may be."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    [one] = render({"prompt": parts, "response": parts})
    assert (one.text, learnt(one)) == ("ab\nab", ["ab"])
    [two] = render({"text": parts})
    assert learnt(two) == ["ab"]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (("messages", "prompt", "response", "text"), "messages"),
        (("text", "output", "instruction", "prompt", "response"), "alpaca"),
        (("text", "prompt", "response"), "prompt_response"),
        (("text", "completion", "prompt"), "prompt_response"),
        (("prompt", "text"), "text"),
        (("input", "output", "instruction"), "alpaca"),
        (("question", "answer", "text"), "text"),
        (("query", "response", "conversations"), "messages"),
    ],
)
def test_recognition(columns: tuple[str, ...], expected: str) -> None:
    """Formats are recognised by columns, the more specific first."""
    assert FormatOptions().recognise(columns) == expected


@pytest.mark.parametrize(
    "pair",
    ["question answer", "query response", "question response", "input output", "inputs targets", "source target"],
)
def test_usual_pairs(pair: str) -> None:
    """Other usual names of a prompt and its response are as good as these, beside columns that are not read."""
    prompt, response = pair.split()
    [one] = render({"id": 7, prompt: "What?", response: "That."})
    assert one == render({"prompt": "What?", "response": "That."})[0]
    assert FormatOptions().text_columns(("id", response, prompt)) == (prompt, response)


def test_unknown_columns() -> None:
    """Columns that fit no format are listed, with what would fit and how to say so."""
    with pytest.raises(
        UserError,
        match=r"^pool.jsonl: The columns headline, body fit no format.*data\.prompt_column and data\.response_col",
    ):
        render({"headline": "a", "body": "b"})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"response": "b"}, "no column 'prompt'"),
        ({"prompt": "b"}, "no column 'response'"),
        ({"prompt": None, "response": "b"}, "'prompt' must be text, not null"),
        ({"prompt": 3, "response": "b"}, "'prompt' must be text, not int"),
        ({"prompt": "a", "response": ["b"]}, "'response' must be text, not list"),
        ({"prompt": "a", "response": {"b": 1}}, "'response' must be text, not dict"),
        ({"prompt": "a", "response": float("inf")}, "'response' must be text, not float"),
        ({"prompt": "a", "response": [{"type": "image"}]}, "'response' must be text, not list"),
    ],
)
def test_bad_row(row: dict[str, Any], reason: str) -> None:
    """A record that lacks a column or holds the wrong kind of value is named by file, line and row."""
    with pytest.raises(UserError, match=rf"pool\.jsonl, line 2 \(row 1\): {reason}"):
        render({"prompt": "a", "response": "b"}, row)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("hello", "must be a list"),
        ([], "must be a list"),
        (None, "must be a list"),
        (["hello"], "turn 0: a turn must be an object"),
        ([{"content": "x"}], "turn 0: a turn must be an object"),
        ([{"role": "user", "content": None}], "turn 0: the content must be text, not NoneType"),
        ([{"role": "user", "content": [{"type": "text"}]}], "turn 0: the content must be text, not list"),
        ([{"role": "assistant", "content": "hi"}], "begins with the assistant"),
    ],
)
def test_bad_conversation(messages: Any, reason: str) -> None:
    """A conversation that is not a list of role and content is named by file, line, row and turn."""
    with pytest.raises(UserError, match=rf"pool\.jsonl, line 1 \(row 0\).*{reason}"):
        render({"messages": messages}, tokenizer=byte_level(CHATML))


def test_templates_that_refuse() -> None:
    """No template, one that objects, and one that leaves turns nowhere to be found are each told apart."""
    row = {"messages": turns("a", "b", "c", "d")}
    with pytest.raises(UserError, match="has no chat template"):
        render(row)
    with pytest.raises(UserError, match=r"row 0.*refuses the conversation \(Roles must alternate\)"):
        render({"messages": row["messages"][:1] * 2}, tokenizer=byte_level(STRICT))
    with pytest.raises(UserError, match=r"row 0.*rewrites what comes before turn 1"):
        render(row, tokenizer=byte_level(RESTLESS))


def test_contradictory_options() -> None:
    """Options that contradict each other, or make no sense, are refused at construction."""
    # the types, where they are checked at run time, refuse it even before
    with pytest.raises((UserError, TypeCheckError), match=r"'chat'"):
        FormatOptions(format="chat")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"data\.prompt_column.*not to alpaca"):
        FormatOptions(format="alpaca", prompt_column="q")
    with pytest.raises(UserError, match=r"data\.prompt_template='x' must contain \{prompt\}"):
        FormatOptions(prompt_template="x")
