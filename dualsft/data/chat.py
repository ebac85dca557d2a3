"""Conversations -> text with the assistant's turns as supervised spans, through the tokenizer's chat template."""

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from dualsft.data.templates import ChatTemplate, Span
from dualsft.data.turns import Message, Turn, functions
from dualsft.errors import UserError

_PROBE = "\ue000"  # stands in for a turn's content; of private use, so that no text or template has it
_THOUGHT = re.compile(r"([<\[][^<>\[\]]*(think|thought|reason)[^<>\[\]]*[>\]]\s*)+$", re.IGNORECASE)
"""A thought that is opened, or over, at the end of a prompt."""
_END_OF_THOUGHT = "</think>"
_BEGUN = re.compile(r"[<\[{(][^<>\[\]{}()]*$")  # a mark that is opened and not closed
_WORD = re.compile(r"\w+$")


@dataclass(frozen=True)
class Conversation:
    """One conversation, and the chat template that renders it."""

    turns: Sequence[Turn]
    template: ChatTemplate
    _texts: dict[tuple[int, bool], str] = field(default_factory=dict)

    def rendered(self) -> tuple[str, tuple[Span, ...]]:
        """The text, and the character ranges to learn from, ascending.

        Where the template marks what is generated, these are its blocks. Otherwise each range starts where generation
        would start, and includes the template's end-of-turn marker. No turn but those to be learnt has any.

        Raises:
            UserError: If the template refuses the conversation, leaves out what is to be learnt, or writes a turn such
                that it cannot be found in the text.
        """
        if self.template.marks_what_is_generated:
            text, spans = self._blocks()
        else:
            text = self._first(len(self.turns))
            spans = None
        if (parsed := self._parsed(text)) is not None:
            return parsed.rendered()
        self._check_tools(text)
        return text, tuple(self._spans(text)) if spans is None else spans

    def _parsed(self, text: str) -> "Conversation | None":
        """The conversation with the arguments of calls as objects, if JSON text of them was written as a text again."""
        if not any(turn.has_json_within(text) for turn in self.turns):
            return None
        return Conversation([turn.with_parsed_arguments() for turn in self.turns], self.template)

    def _blocks(self) -> tuple[str, tuple[Span, ...]]:
        """The text, and the blocks of the turns to be learnt: blocks come in the order of turns."""
        text, blocks = self.template.render_with_blocks(self._messages())
        unwanted = [k for k, turn in enumerate(self.turns) if turn.message["role"] == "assistant" and not turn.learnt]
        for turn in unwanted:
            first, last = (self._count(k) if k < len(self.turns) else len(blocks) for k in (turn, turn + 1))
            blocks[first:last] = [(0, 0)] * len(blocks[first:last])
        for turn in range(len(self.turns)):
            self._check_called(turn, text)
        return text, tuple(block for block in blocks if block[0] < block[1])

    def _count(self, turns: int) -> int:
        """The number of blocks of the first turns."""
        return len(self.template.render_with_blocks(self._messages()[:turns])[1]) if turns else 0

    def _spans(self, text: str) -> Iterator[Span]:
        self._check_header(next((turn for turn, this in enumerate(self.turns) if this.learnt), 0))
        for turn, this in enumerate(self.turns):
            if this.learnt:
                start = self._start(text, turn)
                end = self._end(text, turn, start)
                self._check_said(turn, text[start:end])
                self._check_called(turn, text[start:end])
                yield start, end
                self._texts.clear()  # of a long conversation all of them together are too much

    def _start(self, text: str, turn: int) -> int:
        if turn == 0:
            raise UserError(
                f"{self.template.where}: the conversation begins with the assistant; put a user turn before it."
            )
        prompt = self._first(turn, add_generation_prompt=True)
        if text.startswith(prompt):
            return len(prompt)
        if text.startswith(header := _THOUGHT.sub("", prompt)):  # a finished turn may have no thought
            return len(header)
        # Else the prompt goes on in another way behind the assistant's header, which ends where a content begins.
        probe = self.template.render(self._probe(turn))
        start = _shared(prompt, probe)
        if not probe[start:].lstrip().startswith(_PROBE) or not text.startswith(probe[:start]):
            raise self.template.fault(
                f"rewrites what comes before turn {turn}, so its start cannot be found; use a template that leaves "
                "earlier turns as they are."
            )
        return start

    def _end(self, text: str, turn: int, start: int) -> int:
        if turn == len(self.turns) - 1:
            return len(text)
        alone = self._first(turn + 1)
        if text.startswith(alone):
            return len(alone)
        # The template ends the whole otherwise than a turn that others follow, as Phi-3's does.
        alone, header = self._followed(turn)
        if text.startswith(alone):
            return len(alone)
        # It writes the turn's content otherwise, as Qwen3's does, which drops its thought: what both renderings share
        # behind the content is the end-of-turn marker.
        there, here = self._behind_content(alone, header, text, turn, start)
        return here + _agreement(alone[there:], text[here:])

    def _followed(self, turn: int) -> tuple[str, str]:
        """The text of the turns up to this one where another follows, and the next one's header that is taken off."""
        followed = self._first(turn + 1, add_generation_prompt=True)
        if followed.startswith(alone := self._first(turn + 1)):
            return alone, followed[len(alone) :]
        # A prompt behind an answer has that one's end in place of the whole's, which is no part of the header.
        asked = next((k for k in range(turn, 0, -1) if self.turns[k - 1].message["role"] != "assistant"), turn)
        prompt = self._first(asked, add_generation_prompt=True)
        header = prompt[_agreement(prompt, self._first(asked)) :]
        return followed.removesuffix(header), header

    def _behind_content(self, alone: str, header: str, text: str, turn: int, start: int) -> Span:
        """Where a turn's content ends in two renderings, of the turns up to it and of all."""
        content = self.turns[turn].content
        for said in (content, content.strip(), content.rsplit(_END_OF_THOUGHT, 1)[-1].strip()):
            if said and text.startswith(said, start) and alone.count(said, start) == 1:
                return alone.index(said, start) + len(said), start + len(said)
        probe = self._probe(turn)
        other = self.template.render(probe[: turn + 1], add_generation_prompt=True).removesuffix(header)
        there = len(alone) - _shared(alone[::-1], other[::-1])
        here = len(text) - _shared(text[::-1], self.template.render(probe)[::-1])
        missing = max(0, start - here)  # a content that is empty, or not written beside calls, ends anywhere
        if alone[there : there + missing] != text[here : here + missing]:
            raise self._unrecognised(turn)
        return there + missing, here + missing

    def _first(self, turns: int, add_generation_prompt: bool = False) -> str:
        """The text of the first turns."""
        key = turns, add_generation_prompt
        if key not in self._texts:
            self._texts[key] = self.template.render(self._messages()[:turns], add_generation_prompt)
        return self._texts[key]

    def _probe(self, turn: int) -> list[Message]:
        """The messages with another content of one of them."""
        messages = self._messages()
        messages[turn] = {**messages[turn], "content": _PROBE}
        return messages

    def _messages(self) -> list[Message]:
        return [turn.message for turn in self.turns]

    def _check_header(self, turn: int) -> None:
        """Refuses a template that has its prompt for an answer behind every text, where it would be learnt."""
        if turn == 0:
            return
        prompt, text = self._first(turn, add_generation_prompt=True), self._first(turn + 1)
        header = _shared(prompt[::-1], text[::-1])
        if not prompt[len(prompt) - header :].strip() or prompt != self._first(turn):
            return
        try:
            followed = self.template.render([*self._messages()[: turn + 1], {"role": "user", "content": _PROBE}])
        except UserError:  # it asks for another turn here
            return
        if followed.startswith(text[: len(text) - header]) and not followed.startswith(text):
            raise self.template.fault(
                "writes the assistant's header behind every conversation, asked for or not, so that it would be "
                "learnt; have it do so only {% if add_generation_prompt %}."
            )

    def _check_said(self, turn: int, text: str) -> None:
        """Refuses a turn of whose content not one word is in its part of the text; beside calls it may be left out."""
        content = self.turns[turn].content
        said = content.rsplit(_END_OF_THOUGHT, 1)[-1].strip() or content
        if said in text or self.turns[turn].functions:
            return
        words = re.findall(r"\w+", said)
        if words and not any(word in text for word in words):
            raise self._unrecognised(turn)

    def _check_called(self, turn: int, text: str) -> None:
        """Refuses a turn that calls a function whose name is not in its part of the text."""
        for function in self.turns[turn].functions:
            if function["name"] not in text:
                raise self.template.fault(
                    f"does not write the call of {function['name'][:60]!r} in turn {turn}; use a template for tool "
                    "calls, or remove the record."
                )

    def _check_tools(self, text: str) -> None:
        for function in functions(self.template.tools or []):
            name = function.get("name")
            if isinstance(name, str) and name not in text:
                raise self.template.fault(
                    f"does not write the record's tools ({name[:60]!r}); use a template for tools, or remove the "
                    "column 'tools'."
                )

    def _unrecognised(self, turn: int) -> UserError:
        return self.template.fault(f"rewrites turn {turn} beyond recognition.")


def _agreement(one: str, other: str) -> int:
    """The length of what two texts share at their start, up to a mark or a word that only begins alike in both."""
    size = _shared(one, other)
    if size in (len(one), len(other)):
        return size
    if begun := _BEGUN.search(one[:size]):
        return begun.start()
    word = _WORD.search(one[:size])
    return word.start() if word and _WORD.match(one[size]) and _WORD.match(other[size]) else size


def _shared(one: str, other: str) -> int:
    """The length of what two texts share at their start."""
    return bisect_left(range(1, min(len(one), len(other)) + 1), True, key=lambda n: one[:n] != other[:n])
