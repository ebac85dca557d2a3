"""The option parser's refusals in plain words."""

import re


def plainly(message: str) -> str:
    """One sentence for what the parser says in many lines; what it says plainly stays."""
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
