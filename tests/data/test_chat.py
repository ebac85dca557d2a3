import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from dualsft.data.examples import load_examples
from dualsft.data.formats import Rendered
from dualsft.data.options import FormatOptions
from dualsft.data.texts import record_text
from dualsft.errors import UserError
from tests.data.test_formats import learnt, render, turns
from tests.world import templates
from tests.world.data import write_jsonl
from tests.world.tokenizers import CHATML, RESTLESS, byte_level

MARKS = ["<|end|>", "<|user|>", "<|assistant|>", "<|start|>", "<|message|>", "<|channel|>", "<|return|>", "<think>"]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
]
WRITTEN = '{"name": "weather", "arguments": {"city": "Oslo"}}'
THOUGHT = "<think>\nhm\n</think>\n\n"


def chat(template: str) -> PreTrainedTokenizerBase:
    """A tokenizer to which the templates' marks are single tokens."""
    tokenizer = byte_level(template)
    tokenizer.add_tokens(MARKS, special_tokens=True)
    return tokenizer


def one(template: str, messages: list[dict[str, Any]], **columns: Any) -> Rendered:
    """One conversation rendered."""
    [rendered] = render({"messages": messages, **columns}, tokenizer=chat(template))
    return rendered


def called(content: str | None, *calls: dict[str, Any]) -> list[dict[str, Any]]:
    """A question, a turn that calls, the result and an answer."""
    call = {"role": "assistant", "content": content, "tool_calls": list(calls or [CALL])}
    return [*turns("cold?"), call, {"role": "tool", "content": "-3"}, {"role": "assistant", "content": "Yes."}]


ANSWERS = {
    "LLAMA3": ["end<|eot_id|>", "no <b<|eot_id|>"],
    "HERMES": ["end<|im_end|>\n", "no <b<|im_end|>\n"],
    "QWEN3": ["end<|im_end|>\n", "<think>\n\n</think>\n\nno <b<|im_end|>\n"],
    "QWEN3_THINKING": ["end<|im_end|>\n", "\n</think>\n\nno <b<|im_end|>\n"],
    "THOUGHTLESS": ["end<|im_end|>\n", "no <b<|im_end|>\n"],
    "PHI3": ["end<|end|>\n", "no <b<|end|>\n<eos>"],
    "PHI4_MINI": ["end<|end|>", "no <b<|end|><eos>"],
    "GEMMA": ["end<end_of_turn>\n", "no <b<end_of_turn>\n"],
    "MISTRAL": [" end<eos>", " no <b<eos>"],
    "DEEPSEEK_R1": ["end<eos>", "no <b<eos>"],
    "HARMONY": ["<|channel|>final<|message|>end<|end|>", "<|channel|>final<|message|>no <b<|return|>"],
    "MARKED": ["end<|im_end|>", "no <b<|im_end|>"],
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_as_known_models_write_them(name: str, tmp_path: Path) -> None:
    """Of each answer the content and its end are learnt, also where it spells a mark, and no token of the next turn."""
    messages = turns("hi", "end", "user", "no <b")
    template = getattr(templates, name)
    assert learnt(one(template, messages)) == ANSWERS[name]
    path, tokenizer = write_jsonl(tmp_path / "pool.jsonl", [{"messages": messages}]), chat(template)
    labels = load_examples(path, tokenizer)[0]["labels"]
    assert tokenizer.decode([label for label in labels if label != -100]) == "".join(ANSWERS[name])


FOLLOWED = {
    "HARMONY": [f"<|channel|>final<|message|>{said}<|end|>" for said in ("b", "end")]
    + ["<|channel|>final<|message|>d<|return|>"],
    "PHI3": ["b<|end|>\n", "end<|end|>\n", "d<|end|>\n<eos>"],
    "LLAMA3": ["b<|eot_id|>", "end<|eot_id|>", "d<|eot_id|>"],
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_an_answer_behind_another(name: str) -> None:
    """Of two answers one behind the other each has its end, where that of the whole is another one too."""
    messages = [*turns("a", "b"), {"role": "assistant", "content": "end"}, *turns("c", "d")]
    assert learnt(one(getattr(templates, name), messages)) == FOLLOWED[name]


THOUGHTFUL = {
    "a field": {"content": "b", "reasoning_content": "hm\n"},
    "the content": {"content": f"{THOUGHT}b"},
    "another field": {"content": "b", "thinking": "hm"},
}


@pytest.mark.parametrize("kind", THOUGHTFUL)
def test_thoughts_that_the_template_leaves_out(kind: str, tmp_path: Path) -> None:
    """That what is thought is not learnt is said: of a field that is not read, of what is cut off, of old turns."""
    first = [*turns("a"), {"role": "assistant", **THOUGHTFUL[kind]}]
    leaving_out = templates.DEEPSEEK_R1 if kind == "the content" else CHATML
    for template, messages in ((leaving_out, first), (templates.HARMONY, [*first, *turns("c", "d")])):
        if template == templates.HARMONY and kind != "another field":
            continue
        path = write_jsonl(tmp_path / "pool.jsonl", [{"messages": turns("x", "y")}, {"messages": messages}])
        with pytest.warns(UserWarning, match="leaves out what is thought before some answers"):
            load_examples(path, chat(template))


def test_thoughts_that_are_written() -> None:
    """Nothing is said of them, of an empty thought, or of a turn that is not learnt."""
    empty = [{"content": "<think>\n\n</think>\n\nb"}, {"content": "b", "thinking": ""}]
    for message in ({"content": f"{THOUGHT}b"}, *empty):
        assert one(templates.QWEN3, [*turns("a"), {"role": "assistant", **message}]).has_thoughts
    unlearnt = {"role": "assistant", "content": "b", "reasoning": "hm", "train": False}
    assert one(CHATML, [*turns("a"), unlearnt, *turns("c", "d")]).has_thoughts


CALLS = {
    "LLAMA3": ['{"name": "weather", "parameters": {"city": "Oslo"}}<|eot_id|>', "Yes.<|eot_id|>"],
    "HERMES": [f"<tool_call>\n{WRITTEN}\n</tool_call><|im_end|>\n", "Yes.<|im_end|>\n"],
    "QWEN3": [f"<tool_call>\n{WRITTEN}\n</tool_call><|im_end|>\n", "<think>\n\n</think>\n\nYes.<|im_end|>\n"],
    "QWEN3_THINKING": [f"<tool_call>\n{WRITTEN}\n</tool_call><|im_end|>\n", "\n</think>\n\nYes.<|im_end|>\n"],
    "MISTRAL": [f"[TOOL_CALLS] [{WRITTEN}]<eos>", " Yes.<eos>"],
    "MARKED": [f"<call>{WRITTEN}</call><|im_end|>", "Yes.<|im_end|>"],
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_learnt(name: str) -> None:
    """A turn that calls is learnt as an answer is, whether its content is null or empty."""
    for content in (None, ""):
        assert learnt(one(getattr(templates, name), called(content)))[-2:] == CALLS[name]


def test_a_conversation_that_ends_in_a_call(tmp_path: Path) -> None:
    """It is no empty example, and is rendered as the template alone would render it, tools included."""
    messages, tokenizer = called(None)[:2], chat(templates.HERMES)
    rendered = one(templates.HERMES, messages, tools=TOOLS)
    assert rendered.text == tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=False)
    assert '"parameters"' in rendered.text
    assert learnt(rendered) == CALLS["HERMES"][:1]


def test_an_earlier_call_whose_thought_is_left_out() -> None:
    """A call is found where the template writes the turn otherwise once another question follows."""
    later = [*called(None), *turns("x", "y")]
    assert learnt(one(templates.QWEN3, later)) == [
        CALLS["QWEN3"][0],
        "Yes.<|im_end|>\n",
        "<think>\n\n</think>\n\ny<|im_end|>\n",
    ]


@pytest.mark.parametrize("tools", [json.dumps(TOOLS), [json.dumps(TOOLS[0])]])
def test_tools_as_json_text(tools: Any) -> None:
    """Descriptions of tools may be JSON text, as data sets have them whose columns must have one type."""
    assert one(templates.HERMES, called(None), tools=tools) == one(templates.HERMES, called(None), tools=TOOLS)


@pytest.mark.parametrize("nothing", [None, [], "", "[]", float("nan")])
def test_no_tools(nothing: Any) -> None:
    """Missing tools and calls, and empty lists of them, are the same."""
    assert one(templates.HERMES, called(None), tools=nothing) == one(templates.HERMES, called(None))
    answer = {"role": "assistant", "content": "b", "tool_calls": nothing}
    assert one(templates.HERMES, [*turns("a"), answer]) == one(templates.HERMES, turns("a", "b"))


def test_arguments_as_json_text() -> None:
    """Arguments that are JSON text reach a template that encodes them as an object, and another one as text."""
    call = {"function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    assert learnt(one(templates.HERMES, called(None, call))) == CALLS["HERMES"]
    verbatim = templates.HERMES.replace("f.arguments | tojson", "f.arguments")
    assert learnt(one(verbatim, called(None, call))) == CALLS["HERMES"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": called(None)}, "does not write the call of 'weather' in turn 1"),
        ({"messages": turns("a", "b"), "tools": TOOLS}, r"does not write the record's tools \('weather'\)"),
        ({"messages": turns("a", "b"), "tools": "hammer"}, "'tools' must be a list of objects"),
        ({"messages": turns("a", "b"), "tools": {"name": "x"}}, "'tools' must be a list of objects"),
        ({"messages": called(None, {"id": "1"})}, "turn 1: each of 'tool_calls' must have the name"),
        ({"messages": [*turns("a"), {"role": "assistant", "function_call": {}}]}, "turn 1: a call must be written as"),
    ],
)
def test_tools_that_are_lost(row: dict[str, Any], reason: str) -> None:
    """Calls and tools that a template does not write, or that cannot be read, are refused and not left out."""
    with pytest.raises(UserError, match=rf"pool\.jsonl, line 1 \(row 0\).*{reason}"):
        render(row, tokenizer=byte_level(CHATML))


def test_a_template_that_reads_no_text() -> None:
    """One that takes contents only as lists would write none of them: it is refused."""
    listing = CHATML.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}")
    with pytest.raises(UserError, match="rewrites turn 1 beyond recognition"):
        one(listing, turns("a", "b"))


def test_a_turn_that_is_a_thought_alone() -> None:
    """What a template leaves out cannot be learnt, and is refused; an answer behind it of marks alone can."""
    with pytest.raises(UserError, match="rewrites turn 1 beyond recognition"):
        one(templates.DEEPSEEK_R1, turns("a", "<think>\nhm\n</think>"))
    assert learnt(one(templates.DEEPSEEK_R1, turns("a", f"{THOUGHT}:-)"))) == ["\n\n:-)<eos>"]


@pytest.mark.parametrize("name", ["DEEPSEEK_R1", "QWEN3_THINKING", "THOUGHTLESS"])
def test_prompts_that_begin_a_thought(name: str) -> None:
    """An answer with a thought and one without are learnt as they are written behind the assistant's header."""
    spans = learnt(one(getattr(templates, name), turns("a", f"{THOUGHT}b", "c", f"{THOUGHT}d")))
    last = {"DEEPSEEK_R1": "\n\nd<eos>", "QWEN3_THINKING": "hm\n</think>\n\nd<|im_end|>\n"}
    assert spans[0].strip() in ("b<eos>", "b<|im_end|>")
    assert spans[1] == last.get(name, f"{THOUGHT}d<|im_end|>\n")


@pytest.mark.parametrize("opening", ["[THINK]", "<|START_THINKING|><|END_THINKING|>", "<budget>0</budget>\n", "/no: "])
def test_other_prompts_that_go_on_behind_the_header(opening: str) -> None:
    """What a prompt has behind the header and a finished turn has not is no part of either."""
    template = CHATML.replace("assistant\n{% endif %}", f"assistant\n{opening}{{% endif %}}")
    assert learnt(one(template, turns("a", "<b>", "c", "d"))) == ["<b><|im_end|>\n", "d<|im_end|>\n"]


def test_long_conversations() -> None:
    """Of the renderings of a conversation's first turns only a few are kept at a time."""
    messages, template = turns(*(f"{i} " * 1000 for i in range(100))), byte_level(CHATML)
    tracemalloc.start()
    [rendered] = render({"messages": messages}, tokenizer=template)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(learnt(rendered)) == 50
    assert peak < 20 * len(rendered.text)


def test_prompts_of_another_conversation() -> None:
    """A template that rewrites earlier turns is refused with that reason, as before."""
    with pytest.raises(UserError, match="rewrites what comes before turn 1"):
        one(RESTLESS, turns("a", "b", "c", "d"))


def marked(key: str, value: Any) -> list[dict[str, Any]]:
    """Two answers, the first of them marked."""
    return [{**turn, **({key: value} if turn["content"] == "b" else {})} for turn in turns("a", "b", "c", "d")]


@pytest.mark.parametrize("template", [CHATML, templates.MARKED, templates.PHI3])
@pytest.mark.parametrize(("key", "off"), [("weight", 0), ("weight", 0.0), ("train", False), ("loss", False)])
def test_turns_marked_as_not_to_be_learnt(template: str, key: str, off: float) -> None:
    """A turn of weight 0 is in the text and not learnt; the others are, and marks that say yes or nothing are that."""
    both = learnt(one(template, turns("a", "b", "c", "d")))
    assert len(both) == 2
    assert learnt(one(template, marked(key, off))) == both[1:]
    for on in (True, None, float("nan")):
        assert learnt(one(template, marked(key, on))) == both


def test_first_turn_marked_as_not_to_be_learnt() -> None:
    """A conversation may begin with the assistant if that turn is not to be learnt."""
    opening = {"role": "assistant", "content": "hello", "weight": 0}
    assert learnt(one(CHATML, [opening, *turns("a", "b")])) == ["b<|im_end|>\n"]


@pytest.mark.parametrize(("key", "value"), [("weight", 0.5), ("weight", "0"), ("train", "no"), ("training", 2)])
def test_marks_that_say_neither(key: str, value: Any) -> None:
    """A weight that is neither 0 nor 1 cannot be followed, and is named with its turn."""
    with pytest.raises(UserError, match=f"turn 1: '{key}' must be 1 or 0, true or false, not "):
        one(CHATML, marked(key, value))


@pytest.mark.parametrize("name", ["gpt", "model", "bot", "Assistant", "AI"])
def test_other_names_of_the_assistant(name: str) -> None:
    """A role by another usual name is the one that templates know."""
    messages = [{"role": "human", "content": "a"}, {"role": name, "content": "b"}]
    assert one(CHATML, messages) == one(CHATML, turns("a", "b"))


def test_roles_that_nobody_knows() -> None:
    """A conversation without an assistant is empty, unless a role is unknown: then it is named."""
    assert learnt(one(CHATML, [*turns("a"), {"role": "tool", "content": "b"}])) == []
    with pytest.raises(UserError, match="no turn is the assistant's, and the role 'expert' is unknown"):
        one(CHATML, [*turns("a"), {"role": "expert", "content": "b"}])


SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


@pytest.mark.parametrize("column", ["conversations", "conversation", "messages"])
@pytest.mark.parametrize("value", [turns("a", "b"), SHAREGPT])
def test_conversations_under_other_names(column: str, value: list[dict[str, str]]) -> None:
    """A column `conversations`, with role and content or with from and value, is read as `messages` is."""
    [rendered] = render({"id": 1, column: value}, tokenizer=byte_level(CHATML))
    assert rendered == one(CHATML, turns("a", "b"))


def test_turns_of_joined_sources() -> None:
    """Each turn has its role and content under one pair of names, and null under the other, or some of each."""
    joined = [
        {"role": None, "content": None, "from": "human", "value": "a"},
        {"role": "assistant", "content": None, "from": None, "value": "b"},
    ]
    for messages in (joined, [{k: v for k, v in turn.items() if v is not None} for turn in joined]):
        assert one(CHATML, messages) == one(CHATML, turns("a", "b"))


def test_the_text_of_a_conversation_under_another_name() -> None:
    """It is found where the renderer finds it, and who speaks is no part of it."""
    columns = FormatOptions().text_columns(("id", "conversations"))
    assert record_text({"id": 1, "conversations": SHAREGPT}, columns) == "a\nb"


def test_other_formats_come_before_conversations() -> None:
    """Records that have been read by other columns still are; a name that is given is not replaced."""
    [two] = render({"text": "x", "conversations": SHAREGPT})
    assert two.text == "x"
    with pytest.raises(UserError, match=r"fit no format.*data\.messages_column"):
        render({"conversations": SHAREGPT}, messages_column="turns")


def test_the_system_column_of_sharegpt() -> None:
    """Its text is the system's turn, unless there is one among the turns."""
    [two] = render({"conversations": SHAREGPT, "system": "s"}, tokenizer=byte_level(CHATML))
    assert two.text == "<|im_start|>system\ns<|im_end|>\n" + one(CHATML, turns("a", "b")).text
    [three] = render({"conversations": SHAREGPT, "system": None}, tokenizer=byte_level(CHATML))
    assert three == one(CHATML, turns("a", "b"))


def test_contents_of_parts() -> None:
    """A content of text parts is their text; one with another part is refused."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": " b", "image": None}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": parts[:1]}]
    assert one(CHATML, messages) == one(CHATML, turns("a b", "a"))
    with pytest.raises(UserError, match="turn 0: the content must be text, not list; of lists only"):
        one(CHATML, [{"role": "user", "content": [*parts, {"type": "image"}]}])


@pytest.mark.filterwarnings("ignore:the chat template writes no end")
def test_generation_blocks_decide(tmp_path: Path) -> None:
    """The tokens to learn are those of transformers' own mask, header and all if the template says so."""
    with_header = "{% for m in messages %}{% if m.role == 'assistant' %}{%- generation -%}<|im_start|>assistant\n"
    with_header += "{{ m.content }}{% endgeneration %}<|im_end|>{% else %}{{ m.content }}{% endif %}{% endfor %}"
    messages = turns("a", "b🙂", "c", "d")
    for template in (templates.MARKED, with_header):
        tokenizer = byte_level(template)
        row = load_examples(write_jsonl(tmp_path / "pool.jsonl", [{"messages": messages}]), tokenizer)[0]
        reference: Any = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert row["input_ids"] == reference["input_ids"]
        assert [int(label != -100) for label in row["labels"]] == reference["assistant_masks"]


def test_generation_blocks_of_prompts_and_blank_turns() -> None:
    """A block of a turn that is not to be learnt, because it is blank or in the prompt, is left out."""
    assert learnt(one(templates.MARKED, turns("a", " ", "c", "d"))) == ["d<|im_end|>"]
    row = {"prompt": turns("q", "old", "r"), "completion": [{"role": "assistant", "content": "new"}]}
    [two] = render(row, tokenizer=byte_level(templates.MARKED))
    assert learnt(two) == ["new<|im_end|>"]


def test_a_header_behind_every_text() -> None:
    """The first templates of Llama 3 ask for an answer behind every conversation: the header is not learnt as text."""
    always = templates.LLAMA3 + "<|start_header_id|>assistant<|end_header_id|>\n\n"
    prompted = "{% if add_generation_prompt %}"
    always = always if prompted not in templates.LLAMA3 else templates.LLAMA3.replace(prompted, "{% if true %}")
    for messages in (turns("a", "b"), turns("a", "b", "c", "d"), turns("b", "b", "b")):
        with pytest.raises(UserError, match=r"the assistant's header behind every conversation.*learnt"):
            one(always, messages)
    same_ends = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    assert learnt(one(same_ends, turns("a", "b", "c", "b"))) == ["[assistant] b<eos>"] * 2
    thoughtless = "{% for m in messages %}{{ m.content if loop.last else m.content.split('>')[-1] }};{% endfor %}"
    assert learnt(one(thoughtless, turns("a;", "<t>b;", "c", "<t>d;"))) == ["b;;", "<t>d;;"]


NO_END = {
    "by the next role": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}",
    "not behind the last": "{% for m in messages %}{{ m.content }}{{ '' if loop.last else '#' }}{% endfor %}",
    "outside of the block": templates.MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"),
}


@pytest.mark.parametrize("name", NO_END)
def test_no_end_of_an_answer(name: str, tmp_path: Path) -> None:
    """That no end is learnt is said, as the model would never stop; white space alone is none."""
    path = write_jsonl(tmp_path / "pool.jsonl", [{"messages": turns("a", "b ")}])
    assert "<|im_end|>{% endgeneration" in templates.MARKED
    with pytest.warns(UserWarning, match="writes no end of turn behind an answer, or none that is learnt"):
        load_examples(path, chat(NO_END[name]))


def test_generation_blocks_that_cannot_be_placed() -> None:
    """A block inside a macro is written later than it is tracked: the template is refused."""
    macro = "{% macro said(m) %}x{% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}"
    template = macro + "{% for m in messages %}{{ said(m) }}{% endfor %}"
    with pytest.raises(UserError, match=r"\{% generation %\} block within a macro"):
        one(template, turns("a", "b"))
    plain = "{% macro mark() %}x{% endmacro %}{% set n = 1 %}" + templates.MARKED
    assert learnt(one(plain, turns("a", "b"))) == ["b<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 1 / (messages | length - 2) }}", "division by zero"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "recursion"),
        ("{{ 2.0 ** 99999 }}", "out of range"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ raise_exception('z' * 99999) }}", r"z{150} \.\.\. z{150}"),
        ("{{ 'x' * (messages | length * 100000000000) }}", "more than 1 GiB of memory"),
        ("{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}", "of memory"),
        ("{{ 'x' * (messages | length * 40000000) }}", "makes 80,000,000 characters"),
    ],
)
def test_templates_that_fail(template: str, reason: str) -> None:
    """A template that divides by zero, calls itself or grows without bound ends in one sentence about it."""
    with pytest.raises(
        UserError, match=rf"pool\.jsonl, line 1 \(row 0\): the tokenizer's chat template .*{reason}"
    ) as e:
        one(template, turns("a", "b"))
    assert len(str(e.value)) < 1000
