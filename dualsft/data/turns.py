"""The value of a conversation's column -> turns as chat templates know them, each to be learnt or not."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dualsft.data.json_text import parsed
from dualsft.data.texts import as_text, is_missing
from dualsft.errors import UserError

Message = dict[str, Any]

_ROLES: dict[str, str] = {
    **{name: name for name in ("system", "developer", "user", "assistant", "tool")},
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot", "chatbot", "ai", "bing", "bard"), "assistant"),
    "observation": "tool",
}
_OTHERS = ("function", "ipython", "environment", "context", "documents")  # roles that some templates know
_MARKS = ("weight", "train", "training", "loss")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_SHAREGPT = {"from": "role", "value": "content"}


@dataclass(frozen=True)
class Turn:
    """One turn.

    Attributes:
        message: What the chat template gets; its role is ``assistant`` where it is the assistant's.
        learnt: Whether it is the assistant's, says or calls something, and is not marked as not to be learnt.
    """

    message: Message
    learnt: bool

    @property
    def content(self) -> str:
        """What is said; empty where only functions are called."""
        return str(self.message.get("content", ""))

    @property
    def thought(self) -> str:
        """What is thought before the answer, in a field of its own or at the start of the content; empty if nothing."""
        own = next((value for name in _THOUGHTS if (value := as_text(self.message.get(name)))), "")
        return (own or self.content.rpartition("</think>")[0].rpartition("<think>")[2]).strip()

    @property
    def is_system(self) -> bool:
        """Whether it holds instructions that come before what the user says."""
        return self.message["role"] in ("system", "developer")

    @property
    def functions(self) -> list[Message]:
        """The functions called, each with its name and arguments."""
        return functions(self.message.get("tool_calls") or [])

    def has_json_within(self, text: str) -> bool:
        """Whether arguments that are JSON text are in this text as a JSON string, encoded twice."""
        texts = [function.get("arguments") for function in self.functions]
        return any(
            isinstance(one, str) and _is_object(one) and json.dumps(one, ensure_ascii=False) in text for one in texts
        )

    def with_parsed_arguments(self) -> "Turn":
        """The turn with arguments that are JSON text as objects."""
        if not self.functions:
            return self
        calls = [_with_parsed_arguments(call) for call in self.message["tool_calls"]]
        return replace(self, message={**self.message, "tool_calls": calls})


def functions(tools: Sequence[Message]) -> list[Message]:
    """The functions that tools, or calls of them, are: some writers wrap each as ``{type, function}``."""
    return [tool["function"] if isinstance(tool.get("function"), dict) else tool for tool in tools]


def read_turns(value: Any, where: str) -> list[Turn]:
    """Reads a list of ``{role, content}``, or of ``{from, value}`` as ShareGPT has it, or JSON text of one.

    Other usual names of a role become the templates' own, an assistant's null content becomes empty, and a content
    that is a list of text parts becomes their text. The marks of a turn that is not to be learnt are ``weight``,
    ``train``, ``training`` and ``loss`` of 0 or false.

    Raises:
        UserError: If the value is anything else, or a mark says neither yes nor no.
    """
    if isinstance(value, str):
        try:
            value = parsed(value)
        except ValueError as error:
            raise UserError(
                f"{where}: the conversation must be a list of {{role, content}} or JSON text of one, and this text is "
                f"not valid JSON ({error}); write it with json.dumps."
            ) from error
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: the conversation must be a list of {{role, content}}.")
    return [_read_turn(message, f"{where}, turn {turn}") for turn, message in enumerate(value)]


def check_roles(turns: Sequence[Turn], where: str) -> None:
    """Refuses turns of which none is the assistant's, if one has a role that nobody knows."""
    roles = [turn.message["role"] for turn in turns]
    unknown = [role for role in roles if role not in _ROLES and role not in _OTHERS]
    if unknown and "assistant" not in roles:
        raise UserError(
            f"{where}: no turn is the assistant's, and the role {unknown[0][:40]!r} is unknown; name the roles user "
            "and assistant."
        )


def read_tools(value: Any, where: str) -> list[Message] | None:
    """Reads descriptions of tools, a list of objects or JSON text of them; None if there are none.

    Raises:
        UserError: If the value is anything else.
    """
    return _objects(value, f"{where}: 'tools'") or None


def _read_turn(message: Any, where: str) -> Turn:
    if isinstance(message, dict):
        message = _in_usual_names(message)
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UserError(f"{where}: a turn must be an object with a role and a content.")
    name: str = message["role"]
    role = _ROLES.get(name.lower(), name)
    calls = _calls(message, where)
    content = _content(message.get("content"), role, bool(calls), where)
    read = {**message, "role": role, "content": content}
    if not is_missing(message.get("tool_calls")):
        read["tool_calls"] = calls
    says = bool(calls) or bool(content and content.strip())
    learnt = role == "assistant" and says and _is_wanted(message, where)
    return Turn({key: value for key, value in read.items() if not is_missing(value)}, learnt)


def _in_usual_names(message: Message) -> Message:
    """The turn with ``from`` and ``value`` as role and content, where it has no others."""
    read = {key: value for key, value in message.items() if key not in _SHAREGPT}
    for theirs, name in _SHAREGPT.items():
        if theirs in message and is_missing(read.get(name)):
            read[name] = message[theirs]
    return read


def _content(value: Any, role: str, calls: bool, where: str) -> str | None:
    """The text of a turn; None for none beside calls, as templates tell a missing content from an empty one."""
    if role == "assistant" and is_missing(value):
        return None if calls else ""
    content = as_text(value)
    if content is None:
        lists = "; of lists only those of parts {type: text, text} are text" if isinstance(value, list) else ""
        raise UserError(f"{where}: the content must be text, not {type(value).__name__}{lists}.")
    return content


def _calls(message: Message, where: str) -> list[Message]:
    if not is_missing(message.get("function_call")) or message["role"] == "function_call":
        raise UserError(f"{where}: a call must be written as an assistant's tool_calls, not as function_call.")
    calls = _objects(message.get("tool_calls"), f"{where}: 'tool_calls'")
    if not all(isinstance(function.get("name"), str) for function in functions(calls)):
        raise UserError(f"{where}: each of 'tool_calls' must have the name of a function.")
    return calls


def _is_wanted(message: Message, where: str) -> bool:
    marks = {key: message[key] for key in _MARKS if not is_missing(message.get(key))}
    if type(marks.get("loss")) is not bool:  # a number may be a loss that somebody measured
        marks.pop("loss", None)
    for key, value in marks.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise UserError(f"{where}: {key!r} must be 1 or 0, true or false, not {json.dumps(value)[:40]}.")
    return all(marks.values())


def _objects(value: Any, what: str) -> list[Message]:
    """A list of objects; the list, or each of them, may be JSON text."""
    if is_missing(value) or value == "":
        return []
    try:
        items = json.loads(value) if isinstance(value, str) else value
        objects = [json.loads(item) if isinstance(item, str) else item for item in items]
    except (ValueError, TypeError, RecursionError):
        objects = [None]
    if not all(isinstance(item, dict) for item in objects) or isinstance(items, dict):
        raise UserError(f"{what} must be a list of objects.")
    return objects


def _with_parsed_arguments(call: Message) -> Message:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_parsed_arguments(call["function"])}
    arguments = call.get("arguments")
    if not isinstance(arguments, str) or not _is_object(arguments):
        return call
    return {**call, "arguments": json.loads(arguments)}


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False
