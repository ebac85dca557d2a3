"""Conversations -> text with the assistant's turns as supervised spans, through the tokenizer's chat template."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dualsft.errors import UserError

Message = dict[str, Any]
_END_OF_THOUGHT = "</think>"


@dataclass(frozen=True)
class Conversation:
    """One conversation, the tokenizer whose chat template renders it, and its location for errors."""

    messages: Sequence[Message]
    tokenizer: PreTrainedTokenizerBase
    where: str

    def spans(self, text: str, first: int) -> Iterator[tuple[int, int]]:
        """Yields the character range of every non-empty assistant turn from turn ``first`` on.

        A range of ``text``, the rendered conversation, starts where generation would start and includes the template's
        end-of-turn marker.

        Raises:
            UserError: If the template writes a turn such that it cannot be found in the text.
        """
        for turn, message in enumerate(self.messages):
            if turn >= first and message["role"] == "assistant" and message["content"].strip():
                start = self._start(text, turn)
                yield start, self._end(text, turn, start)

    def render(self, turns: int, add_generation_prompt: bool = False) -> str:
        """Renders the first ``turns`` turns."""
        try:
            text = self.tokenizer.apply_chat_template(
                list(self.messages[:turns]), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise UserError(
                f"{self.where}: the tokenizer's chat template refuses the conversation ({error})."
            ) from error
        return str(text)

    def _start(self, text: str, turn: int) -> int:
        if turn == 0:
            raise UserError(f"{self.where}: the conversation begins with the assistant; put a user turn before it.")
        prompt = self.render(turn, add_generation_prompt=True)
        if not text.startswith(prompt):
            raise UserError(
                f"{self.where}: the tokenizer's chat template rewrites what comes before turn {turn}, so its start "
                "cannot be found; use a template that leaves earlier turns as they are."
            )
        return len(prompt)

    def _end(self, text: str, turn: int, start: int) -> int:
        alone = self.render(turn + 1)
        if text.startswith(alone):
            return len(alone)
        # The template writes this turn differently once others follow (Qwen3 drops its reasoning): find its content,
        # then include as much of the end-of-turn marker behind it as both renderings share.
        content = self._visible(text, alone, turn, start)
        end = text.index(content, start) + len(content)
        marker = alone[alone.rindex(content) + len(content) :]
        shared = takewhile(lambda pair: pair[0] == pair[1], zip(marker, text[end:], strict=False))
        return end + len(list(shared))

    def _visible(self, text: str, alone: str, turn: int, start: int) -> str:
        content = self.messages[turn]["content"]
        for candidate in (content.strip(), content.rsplit(_END_OF_THOUGHT, 1)[-1].strip()):
            if candidate and candidate in alone and text.find(candidate, start) >= 0:
                return candidate
        raise UserError(f"{self.where}: the tokenizer's chat template rewrites turn {turn} beyond recognition.")


def check_messages(value: Any, where: str) -> list[Message]:
    """Refuses anything but a list of ``{role, content}``; an assistant's null content becomes empty."""
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: the conversation must be a list of {{role, content}}.")
    return [_check_message(message, f"{where}, turn {turn}") for turn, message in enumerate(value)]


def _check_message(message: Any, where: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UserError(f"{where}: a turn must be an object with a role and a content.")
    content = message.get("content")
    if content is None and message["role"] == "assistant":
        content = ""
    if not isinstance(content, str):
        raise UserError(f"{where}: the content must be text, not {type(content).__name__}.")
    return {**message, "content": content}
