"""The sources of validation sets by name, and the format of records with its recognition."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from dualsft.errors import UserError, naming
from dualsft.storage.paths import expanded

TRAIN = "data.train"
"""The option that gives the source of the pool."""
_NAME = re.compile(r"[\w-]+")

Format = Literal["auto", "prompt_response", "alpaca", "messages", "text"]

_ANSWERS = ("response", "completion", "output")
_CONVERSATIONS = ("conversations", "conversation")
_PAIRS = (
    *(("question", "answer"), ("query", "response"), ("input", "output"), ("question", "response")),
    *(("problem", "solution"), ("inputs", "targets"), ("source", "target")),
)
"""Other usual names of a prompt and its response, looked for where the columns fit no other format."""


@dataclass(frozen=True)
class FormatOptions:
    """How records are read; see `InstructionDataModule` for each option. Two that contradict each other are refused."""

    format: Format = "auto"
    prompt_column: str | None = None
    response_column: str | None = None
    messages_column: str = "messages"
    text_column: str = "text"
    prompt_template: str = "{prompt}\n"

    def __post_init__(self) -> None:
        if self.format not in get_args(Format):
            raise UserError(f"data.format={self.format!r} is not one of {', '.join(get_args(Format))}.")
        if self._names_columns and self.format not in ("auto", "prompt_response"):
            raise UserError(
                "data.prompt_column and data.response_column belong to data.format=prompt_response, "
                f"not to {self.format}; drop one of them."
            )
        if "{prompt}" not in self.prompt_template:
            raise UserError(f"data.prompt_template={self.prompt_template!r} must contain {{prompt}}.")

    @property
    def _names_columns(self) -> bool:
        return self.prompt_column is not None or self.response_column is not None

    def recognise(self, columns: tuple[str, ...]) -> Format:
        """The format of records with these columns; refuses those that fit none."""
        if self.format != "auto":
            return self.format
        if self._names_columns:
            return "prompt_response"
        signatures: tuple[tuple[Format, set[str]], ...] = (
            ("messages", {self.messages_column}),
            ("alpaca", {"instruction", "output"}),
            ("prompt_response", {"prompt", "response"}),
            ("prompt_response", {"prompt", "completion"}),
            ("text", {self.text_column}),
            ("messages", {self._conversation(columns)}),
            *(("prompt_response", set(pair)) for pair in _PAIRS),
        )
        for name, needed in signatures:
            if needed <= set(columns):
                return name
        raise UserError(
            f"The columns {', '.join(columns)} fit no format (messages; instruction and output; prompt and response "
            "or completion; text; question and answer, or a usual pair): name the columns with data.prompt_column "
            "and data.response_column, or that of a conversation with data.messages_column."
        )

    def text_columns(self, columns: tuple[str, ...]) -> tuple[str, ...]:
        """The columns that the format reads, given all columns of the records: prompt before response.

        Of several responses each record has one, as where sources of different columns were joined.
        """
        match self.recognise(columns):
            case "alpaca":
                return (*(("history",) if "history" in columns else ()), "instruction", "input", "output")
            case "messages":
                return (self._conversation(columns),)
            case "text":
                return (self.text_column,)
        if pair := self._pair(columns):
            return pair
        answers = tuple(column for column in ("response", "completion") if column in columns) or ("completion",)
        return (self.prompt_column or "prompt", *((self.response_column,) if self.response_column else answers))

    def side_columns(self, name: Format) -> tuple[str, ...]:
        """The columns that a format reads beside those of `text_columns`, where the records have them."""
        return {"alpaca": ("system",), "messages": ("system", "tools")}.get(name, ())

    def other_answers(self, columns: tuple[str, ...]) -> tuple[str, ...]:
        """The columns, of those with a usual name of a response, that the format does not read; none if it is given."""
        if self.format != "auto" or self.response_column is not None:
            return ()
        return tuple(column for column in _ANSWERS if column in columns and column not in self.text_columns(columns))

    def within(self, own: Mapping[str, Any]) -> "FormatOptions":
        """The options for a source that has its own: if it has any of format and columns, it takes none of these.

        Args:
            own: Fields by name.
        """
        if own.keys() <= {"prompt_template"}:
            return replace(self, **own)
        return FormatOptions(**{"prompt_template": self.prompt_template, **own})

    def _pair(self, columns: tuple[str, ...]) -> tuple[str, str] | None:
        """The columns of a prompt and its response where they have another usual pair of names, and none is given."""
        if self._names_columns or ("prompt" in columns and {"response", "completion"} & set(columns)):
            return None
        return next((pair for pair in _PAIRS if set(pair) <= set(columns)), None)

    def _conversation(self, columns: tuple[str, ...]) -> str:
        """The column of the conversation: ``conversations`` and the like where nothing has the default's name."""
        given = self.messages_column
        usual = (name for name in _CONVERSATIONS if name in columns)
        return given if given in columns or given != "messages" else next(usual, given)


def validation_sources(validation: Any) -> dict[str, Any]:
    """What each validation set is read from, by its name, in the order given; a set without one is ``validation``.

    Args:
        validation: A mapping of names to sources; or one source, or a list that is one set; or None.

    Raises:
        UserError: If a mapping is empty, or has a name that is not made of letters, digits, ``_`` and ``-``: names
            become part of the names of metrics and columns.
    """
    if validation is None:
        return {}
    if not isinstance(validation, Mapping):
        return {"validation": validation}
    if not validation:
        raise UserError("data.validation is an empty mapping: give a source, or names with a source each.")
    for name in validation:
        check_name("data.validation", "set", name)
    return dict(validation)


def check_name(key: str, what: str, name: Any) -> None:
    """Refuse a name in a mapping that could not be part of a metric's, a column's or a file's name."""
    if not isinstance(name, str):
        raise UserError(f"{key} names a {what} {name!r}, which is not text: put the name in quotes.")
    if not _NAME.fullmatch(name):
        raise UserError(f"{key} names a {what} {name!r}: use letters, digits, _ and - alone.")
    with naming(key):
        expanded(name)


def validation_key(name: str | None) -> str:
    """The option that gives the source of a validation set, by its name in a mapping; None for a single source."""
    return "data.validation" if name is None else f"data.validation.{name}"
