"""Which selections of an experiment share their scores: one is made, and the others are allocated from it."""

import json
from collections.abc import Mapping, Sequence
from pkgutil import resolve_name
from typing import Any

from dualsft.allocators import DataAllocator, TopK
from dualsft.commands.resolved import at, without
from dualsft.selection.reallocation import sides_behind_scores
from dualsft.selection.settings import CHOICE, options

_DEFAULTS = {"parameter_allocator": "global_top_k", "data_allocator": "top_k"}


def choice_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The options of select that decide what is chosen by given scores, by name."""
    chosen = {name: at(settings, f"model.{name}") for name in CHOICE}
    # said by name, as what `allocate` is not given stays as it was
    return {name: _DEFAULTS.get(name) if value is None else value for name, value in chosen.items()}


def sources(selections: Sequence[Mapping[str, Any]], done: Sequence[bool]) -> list[int]:
    """For each of several settings of select, with what is read among them, which of them gives it its scores.

    Those with the same scores get the same one, itself among them: one that is done already if it can, otherwise the
    one that measures most, and that scores weights if any does.

    Args:
        selections: The settings.
        done: Which of them have been made.
    """
    found = list(range(len(selections)))
    for members in _groups(selections).values():
        order = sorted(members, key=lambda k: (not done[k], *_preference(selections[k])))
        for k in members:
            found[k] = next(s for s in order if s == k or _serves(selections[s], selections[k]))
    return found


def _groups(selections: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for k, settings in enumerate(selections):
        groups.setdefault(json.dumps(_behind_scores(settings), sort_keys=True), []).append(k)
    return groups


def _behind_scores(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that scores depend on."""
    fixed = sides_behind_scores(at(settings, "model.order"), at(settings, "model.rounds"))
    free = [option.name for option in options() if option.role in ("parameters", "data") and option.role not in fixed]
    return without(settings, [f"model.{name}" for name in free])


def _preference(settings: Mapping[str, Any]) -> tuple[bool, int, bool]:
    """A key by which the selections that others can be allocated from come first.

    Of equals that is one without a plugin's allocator: one that fails would take the scores of the others with it.
    """
    paths = [at(settings, f"model.{name}.class_path") or "" for name in _DEFAULTS]
    foreign = any(not path.startswith("dualsft.") for path in paths if path)
    return at(settings, "model.parameter_budget") is None, -len(_needs(settings)), foreign


def _serves(source: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether a selection has measured what another one needs."""
    weights = [at(of, "model.parameter_budget") is not None for of in (settings, source)]
    return _needs(settings) <= _needs(source) and weights[0] <= weights[1]


def _needs(settings: Mapping[str, Any]) -> set[str]:
    """The statistics of examples that the data allocator needs."""
    return set(data_allocator(settings).needs)


def data_allocator(settings: Mapping[str, Any]) -> DataAllocator:
    """The data allocator of settings of select."""
    if (given := at(settings, "model.data_allocator")) is None:
        return TopK()
    made: DataAllocator = resolve_name(given["class_path"])(**given.get("init_args", {}))
    return made
