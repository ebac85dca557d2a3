"""The refusals of the libraries below us, in plain words."""

import re
import traceback
from collections.abc import Iterator

from lightning.fabric.utilities.exceptions import MisconfigurationException

from dualsft.errors import UserError


def unusable(error: BaseException) -> str:
    """Why nothing could be made of the settings: what the part that refused them says, without what wraps it."""
    for cause in _causes(error):
        if isinstance(cause, UserError):
            return str(cause)
    problem = r"Errors:\n\s+- (?:Problem with given class_path .*:\s+)?(.*)"
    refusal, given = re.search(problem, str(error)), re.search(r"class_path='([\w.]+)'", str(error))
    if refusal and given:
        return f"{given[1]} cannot be made with these options: {refusal[1]}"
    return f"These settings cannot be used: {error}"


def refused(error: Exception) -> str | None:
    """What Lightning itself refuses, or the file system, while a run is under way; None for any other error.

    Lightning finds many mistakes in a trainer's settings only as it sets up its loops, and raises errors of all kinds.
    """
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename} cannot be used: {error.strerror}."
    if isinstance(error, (UserError, MisconfigurationException)):
        return None
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    ours = frame.f_globals.get("__name__", "").startswith("lightning.")
    return str(error) if ours and isinstance(error, (ValueError, RuntimeError, TypeError, AttributeError)) else None


def plainly(error: BaseException) -> str:
    """One sentence for what the parser says in many lines; what it says plainly stays."""
    for cause in _causes(error):
        if isinstance(cause, UserError):
            return str(cause)
        if problem := re.match(r"Problem with given class_path '([\w.]+)':\s+(.*)", str(cause), re.DOTALL):
            return _refused_option(str(error), *problem.groups())
    return _sentence(str(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _refused_option(message: str, kind: str, problem: str) -> str:
    """What is wrong with an option of a class that a key names."""
    key = re.search(r'(?:Parser key|Key) "([\w.]+)"', message)
    where, advice = (key[1], f"; `--{key[1]}.help {kind}` shows its options.") if key else (kind, ".")
    if unknown := re.match(r"Option '(\w+)' is not accepted", problem):
        return f"{where}: {kind} has no option {unknown[1]}{advice}"
    if missing := re.search(r"arguments are required: (.*)", problem):
        return f"{where}: {kind} needs {missing[1]}, which is not given{advice}"
    return f"{where}.{_sentence(problem)}"


def _sentence(message: str) -> str:
    key = re.search(r'(?:Parser key|Key) "([\w.]+)"', message)
    if not key:
        return message
    if re.search(r"Got value: None\b", message):
        return f"{key[1]} is not given, and has no default."
    if nested := re.search(r"NestedArg\(key='([\w.]+)', val=(.*?)\)", message):
        return f"{key[1]}.{nested[1]} does not take {nested[2]}; `--{key[1]}.help NAME` shows what there is."
    value = re.search(r"Given value: (.*)", message)
    if "Union subtypes" in message and value:
        return f"{key[1]} does not take {value[1]}; `--print_config` shows what it takes."
    if expected := re.search(r"Expected a (.+?)\. Got value: (.*)", message):
        return f"{key[1]} does not take {expected[2].strip()}: it must be {_kind(expected[1])}."
    if section := re.search(r"Unable to load config ['\"](.*?)['\"]", message):
        return f"{key[1]} does not take {section[1]}: it has keys of its own, which `--print_config` shows."
    return message


def _kind(expected: str) -> str:
    """A type as a reader would name it."""
    if literal := re.fullmatch(r"typing\.Literal\[(.*)\]", expected):
        return f"one of {literal[1].replace(chr(39), '')}"
    if plain := re.fullmatch(r"<class '(?:builtins\.)?(\w+)'>", expected):
        return {"int": "an integer", "float": "a number", "bool": "true or false"}.get(plain[1], f"a {plain[1]}")
    return expected
