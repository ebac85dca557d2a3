"""The option parser's refusals in plain words."""

import re


def plainly(message: str) -> str:
    """One sentence for what the parser says in many lines; what it says plainly stays."""
    key = re.search(r'(?:Parser key|Key) "([\w.]+)"', message)
    if not key:
        return message
    if re.search(r"Got value: None\b", message):
        return f"{key[1]} is not given, and has no default."
    value = re.search(r"Given value: (.*)", message)
    if "Union subtypes" in message and value:
        return f"{key[1]} does not take {value[1]}; `--print_config` shows what it takes."
    return message
