"""Records -> text with supervised character spans. Every format renders to the same `Rendered`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from transformers import PreTrainedTokenizerBase

from dualsft.data.chat import Conversation, check_messages
from dualsft.data.options import FormatOptions
from dualsft.data.records import Records
from dualsft.errors import UserError


@dataclass(frozen=True)
class Rendered:
    """One example before tokenisation.

    Attributes:
        text: Prompt and response as the model will read them.
        spans: Character ranges (start, end) of ``text`` to learn from, ascending; none if there is nothing to learn.
        add_eos: Whether the tokenizer's special tokens belong around the text; a chat template writes its own.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    add_eos: bool


Renderer = Callable[[Mapping[str, Any], str], Rendered]


def make_renderer(records: Records, tokenizer: PreTrainedTokenizerBase, options: FormatOptions) -> Renderer:
    """Chooses one renderer for all records: a function of (record, location).

    Raises:
        UserError: If no format fits or a conversation meets a tokenizer without a chat template. The renderer itself
            raises it for a record that lacks a column or holds the wrong kind of value, naming the location.
    """
    name = options.recognise(records.columns)
    if name == "alpaca":
        return _render_alpaca
    if name == "text":
        return lambda record, where: _answer_to("", _text(record, options.text_column, where))
    if name == "messages":
        return _chat_renderer(tokenizer, options.messages_column)
    prompt, response = options.text_columns(records.columns)
    if isinstance(records[0].get(prompt), list):
        return _chat_renderer(tokenizer, prompt, response)

    def render(record: Mapping[str, Any], where: str) -> Rendered:
        # replace, not format: prompts contain braces
        before = options.prompt_template.replace("{prompt}", _text(record, prompt, where))
        return _answer_to(before, _answer(record, response, where))

    return render


def _render_alpaca(record: Mapping[str, Any], where: str) -> Rendered:
    """Renders the two prompts of the Alpaca data, which models tuned on such data expect verbatim."""
    context = _text(record, "input", where) if record.get("input") is not None else ""
    pairing, section = "", ""
    if context.strip():
        pairing, section = ", paired with an input that provides further context", f"### Input:\n{context}\n\n"
    prompt = (
        f"Below is an instruction that describes a task{pairing}. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{_text(record, 'instruction', where)}\n\n{section}### Response:\n"
    )
    return _answer_to(prompt, _answer(record, "output", where))


def _chat_renderer(tokenizer: PreTrainedTokenizerBase, *columns: str) -> Renderer:
    """Renders the conversation that the columns hold one after the other; the last column's turns are to be learnt."""
    if tokenizer.chat_template is None:
        raise UserError(
            f"The records are conversations but the tokenizer {tokenizer.name_or_path!r} has no chat template: use a "
            "chat model's tokenizer or records with prompt and response."
        )

    def render(record: Mapping[str, Any], where: str) -> Rendered:
        parts = [check_messages(_value(record, column, where), where) for column in columns]
        conversation = Conversation(list(chain.from_iterable(parts)), tokenizer, where)
        text = conversation.render(len(conversation.messages))
        first = len(conversation.messages) - len(parts[-1])
        return Rendered(text, tuple(conversation.spans(text, first)), add_eos=False)

    return render


def _answer_to(prompt: str, response: str) -> Rendered:
    spans = ((len(prompt), len(prompt) + len(response)),) if response.strip() else ()
    return Rendered(prompt + response, spans, add_eos=True)


def _value(record: Mapping[str, Any], column: str, where: str) -> Any:
    if column not in record:
        raise UserError(f"{where}: no column {column!r} (the record has {', '.join(record) or 'none'}).")
    return record[column]


def _text(record: Mapping[str, Any], column: str, where: str) -> str:
    value = _value(record, column, where)
    if not isinstance(value, str):
        raise UserError(f"{where}: {column!r} must be text, not {'null' if value is None else type(value).__name__}.")
    return value


def _answer(record: Mapping[str, Any], column: str, where: str) -> str:
    """A response: null is an empty one, and a number (a label, a result) is written out."""
    value = _value(record, column, where)
    if value is None:
        return ""
    return str(value) if isinstance(value, int | float) else _text(record, column, where)
