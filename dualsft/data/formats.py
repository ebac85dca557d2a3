"""Records -> text with supervised character spans. Every format renders to the same `Rendered`."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

from transformers import PreTrainedTokenizerBase

from dualsft.data.chat import Conversation
from dualsft.data.limits import limited
from dualsft.data.options import FormatOptions
from dualsft.data.records import Records
from dualsft.data.templates import ChatTemplate
from dualsft.data.texts import as_text, is_missing
from dualsft.data.turns import Turn, check_roles, read_tools, read_turns
from dualsft.errors import UserError


@dataclass(frozen=True)
class Rendered:
    """One example before tokenisation.

    Attributes:
        text: Prompt and response as the model will read them.
        spans: Character ranges (start, end) of ``text`` to learn from, ascending; none if there is nothing to learn.
        add_eos: Whether the tokenizer's special tokens belong around the text; a chat template writes its own.
        has_end: Whether what the chat template writes behind the last answer is learnt, and more than white space.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    add_eos: bool
    has_end: bool = True


Renderer = Callable[[Mapping[str, Any], str], Rendered]


def make_renderer(records: Records, tokenizer: PreTrainedTokenizerBase, options: FormatOptions) -> Renderer:
    """Chooses one renderer for all records: a function of (record, location).

    Raises:
        UserError: If no format fits or a conversation meets a tokenizer without a chat template. The renderer itself
            raises it for a record that lacks a column or holds the wrong kind of value, naming the location.
    """
    name, columns = options.recognise(records.columns), options.text_columns(records.columns)
    others = options.other_answers(records.columns)
    if name == "alpaca":
        return partial(_render_alpaca, others=others)
    if name == "text":
        return lambda record, where: _answer_to("", _text(record, options.text_column, where))
    if name == "messages":
        return _chat_renderer(tokenizer, *columns)
    prompt, *answers = columns
    first = records[0].get(prompt)
    if isinstance(first, list) and as_text(first) is None:
        return _chat_renderer(tokenizer, prompt, answers[0])

    def render(record: Mapping[str, Any], where: str) -> Rendered:
        # replace, not format: prompts contain braces
        before = options.prompt_template.replace("{prompt}", _text(record, prompt, where))
        return _answer_to(before, _answer(record, answers, others, where))

    return render


def _render_alpaca(record: Mapping[str, Any], where: str, others: Sequence[str]) -> Rendered:
    """Renders the two prompts of the Alpaca data, which models tuned on such data expect verbatim."""
    context = "" if is_missing(record.get("input")) else _text(record, "input", where)
    pairing, section = "", ""
    if context.strip():
        pairing, section = ", paired with an input that provides further context", f"### Input:\n{context}\n\n"
    prompt = (
        f"Below is an instruction that describes a task{pairing}. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{_text(record, 'instruction', where)}\n\n{section}### Response:\n"
    )
    return _answer_to(prompt, _answer(record, ["output"], others, where))


def _chat_renderer(tokenizer: PreTrainedTokenizerBase, *columns: str) -> Renderer:
    """Renders the conversation that the columns hold one after the other; the last column's turns are to be learnt."""
    if tokenizer.chat_template is None:
        raise UserError(
            f"The records are conversations but the tokenizer {tokenizer.name_or_path!r} has no chat template: use a "
            "chat model's tokenizer or records with prompt and response."
        )

    def render(record: Mapping[str, Any], where: str) -> Rendered:
        *before, last = [read_turns(_value(record, column, where), where) for column in columns]
        check_roles(last, where)
        turns = [replace(turn, learnt=False) for turn in chain.from_iterable(before)] + last
        template = ChatTemplate(tokenizer, read_tools(record.get("tools"), where), where)
        with limited(f"{where}: the tokenizer's chat template"):
            text, spans = Conversation(_with_system(turns, record, columns[0]), template).rendered()
        return Rendered(text, spans, add_eos=False, has_end=_has_end(text, spans, turns))

    return render


def _has_end(text: str, spans: Sequence[tuple[int, int]], turns: Sequence[Turn]) -> bool:
    """Whether more than white space is learnt behind the content of the last turn that is, if it has any."""
    content = next((turn.content.rstrip() for turn in reversed(turns) if turn.learnt), "")
    return not (spans and content and text[slice(*spans[-1])].rstrip().endswith(content))


def _with_system(turns: list[Turn], record: Mapping[str, Any], column: str) -> list[Turn]:
    """The turns behind the system's text, which ShareGPT's records may have in a column of its own."""
    system, is_sharegpt = as_text(record.get("system")), "from" in record[column][0]
    if not is_sharegpt or not system or any(turn.message["role"] == "system" for turn in turns):
        return turns
    return [Turn({"role": "system", "content": system}, learnt=False), *turns]


def _answer_to(prompt: str, response: str) -> Rendered:
    spans = ((len(prompt), len(prompt) + len(response)),) if response.strip() else ()
    return Rendered(prompt + response, spans, add_eos=True)


def _value(record: Mapping[str, Any], column: str, where: str) -> Any:
    if column not in record:
        raise UserError(f"{where}: no column {column!r} (the record has {', '.join(record) or 'none'}).")
    return record[column]


def _text(record: Mapping[str, Any], column: str, where: str) -> str:
    value = _value(record, column, where)
    text = as_text(value)
    if text is None:
        kind = "null" if value is None else type(value).__name__
        raise UserError(f"{where}: {column!r} must be text, not {kind}.")
    return text


def _answer(record: Mapping[str, Any], columns: Sequence[str], others: Sequence[str], where: str) -> str:
    """The response, in the one of the columns that has any; refuses different ones, and one in another column."""
    present = [column for column in columns if column in record] or columns[:1]
    answers = {column: _said(record, column, where) for column in present}
    given = {column: answer for column, answer in answers.items() if answer.strip()}
    if not given:
        _check_others(record, present[0], others, where)
        return answers[present[0]]
    if len(set(given.values())) > 1:
        raise UserError(
            f"{where}: {' and '.join(map(repr, given))} hold different answers; name the one to read with "
            "data.response_column."
        )
    return next(iter(given.values()))


def _check_others(record: Mapping[str, Any], column: str, others: Sequence[str], where: str) -> None:
    for other in others:
        if (as_text(record.get(other)) or "").strip():
            raise UserError(
                f"{where}: {column!r} holds no answer but {other!r} does; give all records the same columns, or name "
                "the one to read with data.response_column."
            )


def _said(record: Mapping[str, Any], column: str, where: str) -> str:
    """A response: a missing one is empty, and a number or truth value (a label, a result) is written out."""
    value = _value(record, column, where)
    if is_missing(value):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) and math.isfinite(value) else _text(record, column, where)
