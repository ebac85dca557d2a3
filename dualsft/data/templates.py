"""Turns -> text through the tokenizer's chat template, which is a program of somebody else."""

import re
from collections.abc import Iterator, Sequence
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


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template for one record, with the tools it may describe and its location for errors."""

    tokenizer: PreTrainedTokenizerBase
    tools: list[Message] | None
    where: str

    @property
    def marks_what_is_generated(self) -> bool:
        """Whether the template has blocks ``{% generation %}``, which say what the assistant generates."""
        return _has_blocks(self._source())

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The text of messages.

        Raises:
            UserError: If the template refuses them, or its text is longer than any conversation.
        """
        tools: Any = self.tools
        with self._as_refusals():
            text = self.tokenizer.apply_chat_template(
                list(messages), tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        return self._checked(str(text))

    def render_with_blocks(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """The text of messages, and the character range of each block ``{% generation %}``.

        Raises:
            UserError: As `render`, or if the place of a block cannot be told.
        """
        if _holds_back_blocks(self._source()):
            raise self.fault(
                "has a {% generation %} block within a macro, a call, a filter or a set, whose place in the text "
                "cannot be told; take the block out of it."
            )
        render: Any = render_jinja_template  # whose annotation is not its result's type
        with self._as_refusals():
            texts, blocks = render(
                conversations=[list(messages)],
                tools=self.tools,
                chat_template=self._source(),
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        return self._checked(texts[0]), [(start, end) for start, end in blocks[0]]

    def fault(self, problem: str) -> UserError:
        """An error in one sentence, of which this is what the template does."""
        return UserError(f"{self.where}: the tokenizer's chat template {problem}")

    def _source(self) -> str:
        tools: Any = self.tools
        with self._as_refusals():  # several templates, none of them the default
            return str(self.tokenizer.get_chat_template(tools=tools))

    @contextmanager
    def _as_refusals(self) -> Iterator[None]:
        """Turn what a template raises into a sentence: it is a program, which can fail in every way."""
        try:
            yield
        except MemoryError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            short = reason if len(reason) <= _LONGEST_REASON else f"{reason[:150]} ... {reason[-150:]}"
            raise self.fault(f"refuses the conversation ({short}).") from error

    def _checked(self, text: str) -> str:
        if len(text) > _LONGEST:
            raise self.fault(f"makes {len(text):,} characters of the conversation; mend or replace it.")
        return text


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
