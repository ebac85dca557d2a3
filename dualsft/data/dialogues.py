"""Records -> turns: of a column that holds a conversation, or of a prompt and a completion that are lists of turns."""

from collections.abc import Sequence
from dataclasses import replace

from dualsft.data.columns import Record, check_alike, text_of, text_or_nothing, value_of
from dualsft.data.texts import as_messages, as_text, is_missing
from dualsft.data.turns import Turn, check_roles, read_turns
from dualsft.errors import UserError


def read_conversation(record: Record, where: str, column: str) -> list[Turn]:
    """The turns of a column, behind the text of a column ``system`` if there is one.

    Raises:
        UserError: If the column is missing or holds no conversation.
    """
    turns = read_turns(value_of(record, column, where), where)
    check_roles(turns, where)
    return _with_system(turns, record, where)


def holds_dialogue(record: Record, prompt: str, answers: Sequence[str]) -> bool:
    """Whether a record's prompt is a list of turns, or JSON text of one and its answer too."""
    value = record.get(prompt)
    if isinstance(value, str):
        return as_messages(value) is not None and any(as_messages(record.get(column)) for column in answers)
    return isinstance(value, list) and as_text(value) is None


def read_dialogue(record: Record, where: str, prompt: str, answers: Sequence[str]) -> list[Turn]:
    """The turns of a prompt, of which none is learnt, and of the answer; a missing answer has no turns.

    Raises:
        UserError: If either is no list of turns, or two columns hold different answers.
    """
    before = [replace(turn, learnt=False) for turn in _turns(record, prompt, where)]
    given = {column: record[column] for column in answers if not is_missing(record.get(column))}
    if not given:
        value_of(record, next((column for column in answers if column in record), answers[0]), where)
        return _with_system(before, record, where)
    check_alike(given, where)
    said = _turns(record, next(iter(given)), where)
    check_roles(said, where)
    return _with_system(before + said, record, where)


def check_no_dialogue(record: Record, prompt: str, answers: Sequence[str], where: str) -> None:
    """Refuses a list of turns among prompts and responses that are text."""
    for column in (prompt, *answers):
        if isinstance(value := record.get(column), list) and as_messages(value):
            raise _mixed(column, "a list of messages", "text", where)


def _turns(record: Record, column: str, where: str) -> list[Turn]:
    value = value_of(record, column, where)
    if as_text(value) is not None and as_messages(value) is None:
        raise _mixed(column, "text", "a list of messages", where)
    return read_turns(value, where)


def _mixed(column: str, found: str, other: str, where: str) -> UserError:
    return UserError(
        f"{where}: {column!r} is {found}, but others of the prompts and responses are {other}; write all of them as "
        "text, or all as lists of {role, content}."
    )


def _with_system(turns: list[Turn], record: Record, where: str) -> list[Turn]:
    """The turns behind the text of a column ``system``, unless a system's turn is among them."""
    if not text_or_nothing(record, "system", where).strip() or any(turn.is_system for turn in turns):
        return turns
    return [Turn({"role": "system", "content": text_of(record, "system", where)}, learnt=False), *turns]
