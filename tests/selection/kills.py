"""Runs that die at a chosen place, as if they had been killed there."""

from copy import copy
from pathlib import Path
from typing import Any

import pytest

from tests.selection.runs import Inputs, select


class KilledError(Exception):
    """Stands for a kill."""


def kill_at(
    monkeypatch: pytest.MonkeyPatch,
    place: Any,
    name: str,
    call: int = 1,
    after: bool = False,
    error: Exception | None = None,
) -> list[int]:
    """Makes the n-th call of a function die, before or after its work; the list counts the calls."""
    function, calls = getattr(place, name), []

    def deadly(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) != call:
            return function(*args, **kwargs)
        if after:
            function(*args, **kwargs)
        raise copy(error) if error else KilledError

    monkeypatch.setattr(place, name, deadly)
    return calls


def killed_run(inputs: Inputs, folder: Path, options: dict[str, Any], *place: Any, **run: Any) -> None:
    """A run that dies at a place (see `kill_at`)."""
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, *place)
        with pytest.raises(KilledError):
            select(inputs, folder, options, **run)
