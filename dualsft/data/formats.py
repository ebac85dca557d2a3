"""Records -> text with supervised character spans. Every format renders to the same `Rendered`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedTokenizerBase

from dualsft.data.alpaca import alpaca_prompt
from dualsft.data.chat import Conversation
from dualsft.data.columns import Record, answer_of, text_of, text_or_nothing, value_of
from dualsft.data.dialogues import check_no_dialogue, holds_dialogue, read_conversation, read_dialogue
from dualsft.data.limits import limited
from dualsft.data.reading import Reading
from dualsft.data.templates import ChatTemplates
from dualsft.data.turns import Turn, read_tools
from dualsft.errors import UserError


@dataclass(frozen=True)
class Rendered:
    """One example before tokenisation.

    Attributes:
        text: Prompt and response as the model will read them.
        spans: Character ranges (start, end) of ``text`` to learn from, ascending; none if there is nothing to learn.
        add_eos: Whether the tokenizer's special tokens belong around the text; a chat template writes its own.
        has_system: Whether the chat template has written what the system says, if it says anything.
        has_thoughts: Whether the chat template has written what is thought before the answers that are learnt.
        has_end: Whether what the chat template writes behind the last answer is learnt, and more than white space.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    add_eos: bool
    has_system: bool = True
    has_thoughts: bool = True
    has_end: bool = True


Renderer = Callable[[Record, str], Rendered]


def make_renderer(reading: Reading, first: Record, tokenizer: PreTrainedTokenizerBase) -> Renderer:
    """Chooses one renderer for all records that are read in one way: a function of (record, location).

    Args:
        reading: The way.
        first: The first of the records, which says whether prompts are conversations.
        tokenizer: The tokenizer, for its chat template and its special tokens.

    Raises:
        UserError: If a conversation meets a tokenizer without a chat template. The renderer itself raises it for a
            record that lacks a column or holds the wrong kind of value, naming the location.
    """
    options, name, columns, others = reading
    if name == "alpaca":
        return _alpaca_renderer(str(tokenizer.eos_token or ""), others)
    if name == "text":
        return partial(_render_text, column=options.text_column)
    if name == "messages":
        return _chat_renderer(tokenizer, partial(read_conversation, column=columns[0]))
    prompt, *answers = columns
    if holds_dialogue(first, prompt, answers):
        return _chat_renderer(tokenizer, partial(read_dialogue, prompt=prompt, answers=answers))

    def render(record: Record, where: str) -> Rendered:
        check_no_dialogue(record, prompt, answers, where)
        # replace, not format: prompts contain braces
        before = options.prompt_template.replace("{prompt}", text_of(record, prompt, where))
        return _answer_to(before, answer_of(record, answers, others, where))

    return render


def _alpaca_renderer(eos: str, others: Sequence[str]) -> Renderer:
    def render(record: Record, where: str) -> Rendered:
        prompt, earlier = alpaca_prompt(record, eos, where)
        return _answer_to(prompt, answer_of(record, ["output"], others, where), earlier)

    return render


def read_columns(reading: Reading, first: Record) -> set[str]:
    """The columns that the renderer of `make_renderer` reads."""
    options, name, columns, _ = reading
    read = {*columns, *options.side_columns(name)}
    if name == "prompt_response" and holds_dialogue(first, columns[0], columns[1:]):
        read |= {*options.side_columns("messages")}
    return read


def _render_text(record: Record, where: str, column: str) -> Rendered:
    value_of(record, column, where)
    return _answer_to("", text_or_nothing(record, column, where))


def _chat_renderer(tokenizer: PreTrainedTokenizerBase, read: Callable[[Record, str], list[Turn]]) -> Renderer:
    """Renders the conversation that ``read`` makes of a record."""
    if tokenizer.chat_template is None:
        raise UserError(
            f"The records are conversations but the tokenizer {tokenizer.name_or_path!r} has no chat template: use a "
            "chat model's tokenizer or records with prompt and response."
        )

    templates = ChatTemplates(tokenizer)

    def render(record: Record, where: str) -> Rendered:
        turns = read(record, where)
        template = templates.of(read_tools(record.get("tools"), where), where)
        with limited(f"{where}: the tokenizer's chat template"):
            text, spans = Conversation(turns, template).rendered()
        has_system = all(turn.content.strip() in text for turn in turns if turn.is_system)
        has_thoughts = all(turn.thought in text for turn in turns if turn.learnt)
        has_end = _has_end(text, spans, turns)
        return Rendered(text, spans, False, has_system, has_thoughts, has_end)

    return render


def _has_end(text: str, spans: Sequence[tuple[int, int]], turns: Sequence[Turn]) -> bool:
    """Whether more than white space is learnt behind the content of the last turn that is, if it has any."""
    content = next((turn.content.rstrip() for turn in reversed(turns) if turn.learnt), "")
    return not (spans and content and text[slice(*spans[-1])].rstrip().endswith(content))


def _answer_to(prompt: str, response: str, earlier: Sequence[tuple[int, int]] = ()) -> Rendered:
    """A prompt and its response; nothing is learnt of an example whose response is blank."""
    spans = (*earlier, (len(prompt), len(prompt) + len(response))) if response.strip() else ()
    return Rendered(prompt + response, spans, add_eos=True)
