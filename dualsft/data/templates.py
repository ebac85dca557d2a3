"""Turns -> text through the tokenizer's chat template, which is a program of somebody else."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from dualsft.data.turns import Message
from dualsft.errors import UserError

Span = tuple[int, int]

_LONGEST, _LONGEST_REASON = 2**26, 300  # characters
_TAG = re.compile(r"\{%[-+]?\s*(\w+)(.*?)[-+]?%\}", re.DOTALL)
_HOLDING_BACK = ("macro", "call", "filter", "set")  # tags whose text is not written where it stands


class ChatTemplates:
    """A tokenizer's chat template, or several of them, and the special tokens that they may write."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._sources: dict[bool, str] = {}
        self.special_tokens = tokenizer.special_tokens_map

    def of(self, tools: list[Message] | None, where: str) -> "ChatTemplate":
        """The one for a record with these tools.

        Raises:
            UserError: If there are several, and none is the default.
        """
        has_tools, known = tools is not None, self._sources
        if has_tools not in known:
            with _as_refusals(where):
                given: Any = tools
                known[has_tools] = str(self._tokenizer.get_chat_template(tools=given))
        return ChatTemplate(known[has_tools], self.special_tokens, tools, where)


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template for one record, with the tools it may describe and the record's location for errors."""

    source: str
    special_tokens: Mapping[str, str]
    tools: list[Message] | None
    where: str

    @property
    def marks_what_is_generated(self) -> bool:
        """Whether the template has blocks ``{% generation %}``, which say what the assistant generates."""
        return _has_blocks(self.source)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The text of messages.

        Raises:
            UserError: If the template refuses them, or its text is longer than any conversation.
        """
        return self._rendered(messages, add_generation_prompt=add_generation_prompt)[0]

    def render_with_blocks(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """The text of messages, and the character range of each block ``{% generation %}``.

        Raises:
            UserError: As `render`, or if the place of a block cannot be told.
        """
        if _holds_back_blocks(self.source):
            raise self.fault(
                "has a {% generation %} block within a macro, a call, a filter or a set, whose place in the text "
                "cannot be told; take the block out of it."
            )
        text, [blocks] = self._rendered(messages, return_assistant_tokens_mask=True)
        return text, [(start, end) for start, end in blocks]

    def _rendered(self, messages: Sequence[Message], **options: bool) -> tuple[str, Any]:
        # what `apply_chat_template` ends in, without what it does before, which read messages have no need of
        render: Any = render_jinja_template  # whose annotation is not its result's type
        with _as_refusals(self.where):
            [text], blocks = render(
                conversations=[list(messages)],
                tools=self.tools,
                chat_template=self.source,
                **options,
                **self.special_tokens,
            )
        if len(text) > _LONGEST:
            raise self.fault(f"makes {len(text):,} characters of the conversation; mend or replace it.")
        return text, blocks

    def fault(self, problem: str) -> UserError:
        """An error in one sentence, of which this is what the template does."""
        return _fault(self.where, problem)


def _fault(where: str, problem: str) -> UserError:
    return UserError(f"{where}: the tokenizer's chat template {problem}")


@contextmanager
def _as_refusals(where: str) -> Iterator[None]:
    """Turn what a template raises into a sentence: it is a program, which can fail in every way."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        short = reason if len(reason) <= _LONGEST_REASON else f"{reason[:150]} ... {reason[-150:]}"
        raise _fault(where, f"refuses the conversation ({short}).") from error


@lru_cache
def _has_blocks(source: str) -> bool:
    return any(tag[1] == "generation" for tag in _TAG.finditer(source))


@lru_cache
def _holds_back_blocks(source: str) -> bool:
    """Whether a block ``{% generation %}`` is in text that the template keeps to write it later."""
    depth = 0
    for tag in _TAG.finditer(source):
        name = tag[1].removeprefix("end")
        if name in _HOLDING_BACK and not (tag[1] == "set" and "=" in tag[2]):
            depth += -1 if tag[1].startswith("end") else 1
        if name == "generation" and depth > 0:
            return True
    return False
