"""Sentences for the parser's errors, which have many lines and name types of Python."""

import inspect
import re
from collections.abc import Iterator
from contextlib import suppress
from pkgutil import resolve_name

from dualsft.commands.keys import advice_on
from dualsft.errors import UserError

_ANY_OPTIMIZER = "torch.optim.Optimizer"
_FIRST = {"model": "model.model_name_or_path", "data": "data.train", "trainer": "trainer.max_epochs"}
_PLAIN = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "a text", "NoneType": "null"}


def plainly(error: BaseException) -> str:
    """One sentence for a parser's error, which may have many lines; a message of one line stays as it is."""
    for cause in causes(error):
        if isinstance(cause, UserError):
            return str(cause)
        if problem := re.match(r"Problem with given class_path '([\w.]+)':\s+(.*)", str(cause), re.DOTALL):
            return _refused_option(str(error), *problem.groups())
    return _sentence(str(error))


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _refused_option(message: str, kind: str, problem: str) -> str:
    """One sentence on a wrong option of the class that a key names."""
    key = re.search(r'(?:Parser key|Key) "([\w.]+)"', message)
    where, advice = (key[1], f"; `--{key[1]}.help {kind}` shows its options.") if key else (kind, ".")
    if unknown := re.match(r"Option '(\w+)' is not accepted", problem):
        if kind == _ANY_OPTIMIZER:  # the parser's type, as no class was named
            return f"{where}.{unknown[1]} is an option of an optimizer, and none is named; give --{where} AdamW too."
        meant = advice_on(unknown[1], _options_of(kind))
        return f"{where}: {kind} has no option {unknown[1]}{f'; {meant}' if meant else advice}"
    if missing := re.search(r"arguments are required: (.*)", problem):
        return f"{where}: {kind} needs {missing[1]}, which is not given{advice}"
    return f"{where}.{_sentence(problem)}"


def _options_of(class_path: str) -> list[str]:
    """The options of a class, those of its bases that it passes on among them."""
    with suppress(Exception):  # whatever a stranger's module raises
        bases = inspect.getmro(resolve_name(class_path))
        return [name for base in bases for name in inspect.signature(base).parameters]
    return []


def _sentence(message: str) -> str:
    key = re.search(r'(?:Parser key|Key) "([\w.]+)"', message)
    if not key:
        if lacking := re.fullmatch(r"argument (\S+): expected one argument", message):
            return (
                f"{lacking[1]} is given without a value; one that begins with a dash follows =, as in {lacking[1]}=-1."
            )
        if positional := re.fullmatch(r"unrecognized arguments: ([^-]\S*).*", message, re.DOTALL):
            return f"{positional[1]} stands where an option was expected; options begin with --, their values follow."
        return message
    if re.search(r"Got value: None\b", message):
        return f"{key[1]} is not given, or null, and needs a value."
    if nested := re.search(r"NestedArg\(key='([\w.]+)', val=(.*?)\)", message):
        return f"{key[1]}.{nested[1]} does not take {nested[2]}; `--{key[1]}.help NAME` shows what there is."
    value = re.search(r"Given value: (.*)", message)
    if "Union subtypes" in message and value:
        return f"{key[1]} does not take {value[1]}{_any_of(re.findall(r'- Expected a (.+)', message))}."
    if expected := re.search(r"Expected a (.+?)\. Got value: (.*)", message):
        return f"{key[1]} does not take {expected[2].strip()}: it must be {_plain(expected[1]) or expected[1]}."
    if section := re.search(r"Unable to load config ['\"](.*?)['\"]", message):
        others = (
            f"such as {_FIRST[key[1]]}, and `--print_config` shows all"
            if key[1] in _FIRST
            else "which `--print_config` shows"
        )
        return f"{key[1]} does not take {section[1]}: it has keys of its own, {others}."
    return message


def _any_of(expected: list[str]) -> str:
    """What one of several types takes, where all of them have plain names."""
    kinds = list(dict.fromkeys(map(_plain, expected)))
    if not kinds or None in kinds:
        return "; `--print_config` shows what it takes"
    *others, last = map(str, kinds)
    return f": it must be {', '.join(others)}{' or ' if others else ''}{last}"


def _plain(expected: str) -> str | None:
    """A plain name for a type that the parser expected; None if there is none."""
    if literal := re.fullmatch(r"typing\.Literal\[(.*)\]", expected):
        return f"one of {literal[1].replace(chr(39), '')}"
    if plain := re.fullmatch(r"<class '(?:builtins\.)?(\w+)'>", expected):
        return _PLAIN.get(plain[1], f"a {plain[1]}")
    return None
