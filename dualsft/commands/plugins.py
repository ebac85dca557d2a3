"""`dualsft plugins`: what is registered, where it came from, and what cannot be used and why."""

from collections.abc import Sequence

from dualsft.errors import UserError
from dualsft.registry import registered


def plugins_command(arguments: Sequence[str]) -> None:
    """List every registered scorer, path and allocator; there are no arguments."""
    if set(arguments) & {"-h", "--help"}:
        print("usage: dualsft plugins\n\nLists the registered scorers, paths and allocators, and what failed to load.")
        return
    if arguments:
        raise UserError(f"dualsft plugins takes no arguments, but was given {' '.join(arguments)}.")
    group = ""
    for item in registered():
        if item.group != group:
            group = item.group
            print(f"\n{group}" if group != "dualsft.scorers" else group)
        told = f"cannot be used: {item.problem}" if item.problem else item.description
        print(f"  {item.name:<18} {item.target:<34} {item.package:<24} {told}")
