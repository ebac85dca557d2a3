"""The prompts of the Alpaca data, which models tuned on such data expect verbatim, and turns that come before them."""

from collections.abc import Iterator
from typing import Any

from dualsft.data.columns import Record, text_of, text_or_nothing
from dualsft.data.json_text import parsed
from dualsft.data.texts import as_text, is_missing
from dualsft.errors import UserError

_PREAMBLE = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
)
_PAIRED = ", paired with an input that provides further context"


def alpaca_prompt(record: Record, eos: str, where: str) -> tuple[str, list[tuple[int, int]]]:
    """The text before a record's output, and the character ranges of the responses in its history.

    The columns ``system`` and ``history`` are LLaMA-Factory's: a text in place of the preamble, and earlier turns, each
    an instruction and its response, which is learnt as the output is, with the end-of-sequence token ``eos``.

    Raises:
        UserError: If a column holds the wrong kind of value.
    """
    context = text_or_nothing(record, "input", where)
    pairing, section = (_PAIRED, f"### Input:\n{context}\n\n") if context.strip() else ("", "")
    system = text_or_nothing(record, "system", where)
    text, spans = f"{system if system.strip() else _PREAMBLE.format(pairing)}\n\n", []
    for instruction, response in _history(record.get("history"), where):
        text += f"### Instruction:\n{instruction}\n\n### Response:\n"
        end = len(text) + len(response) + len(eos)
        if response.strip():
            spans.append((len(text), end))
        text += f"{response}{eos}\n\n"
    return f"{text}### Instruction:\n{text_of(record, 'instruction', where)}\n\n{section}### Response:\n", spans


def _history(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """Earlier instructions and responses: a list of pairs, or JSON text of one."""
    if is_missing(value) or value == "":
        return
    try:
        pairs = parsed(value) if isinstance(value, str) else value
    except ValueError:
        pairs = None
    for pair in pairs if isinstance(pairs, list) else [None]:
        texts = [as_text(part) for part in pair] if isinstance(pair, list) else []
        if len(texts) != 2 or texts[0] is None or texts[1] is None:
            raise UserError(
                f"{where}: 'history' must be a list of pairs [instruction, response], or JSON text of one; mend the "
                "column, or remove or rename it."
            )
        yield texts[0], texts[1]
