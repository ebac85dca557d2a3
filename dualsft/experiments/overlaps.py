"""How far the choices of methods overlap, on either side: Jaccard's |A ∩ B| / |A ∪ B| of two choices A and B.

By chance alone, two choices of the same share s have an overlap of about s/(2 − s).
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from dualsft.experiments.patterns import Chosen, as_given
from dualsft.experiments.statistics import mean_interval
from dualsft.runs.table import markdown_table

_SIDES = ("examples", "weights")


def overlap_rows(chosen: Sequence[Chosen]) -> list[dict[str, Any]]:
    """One row for each two methods and each seed: the overlaps of the sides on which they have the same budget.

    ``examples`` and ``weights`` are the overlaps, null where budgets or models differ or all is taken;
    ``examples_by_chance`` and ``weights_by_chance`` are those of random choices.
    """
    rows = []
    for seed in dict.fromkeys(one.seed for one in chosen):
        own = [one for one in chosen if one.seed == seed]
        weights = _weights(own)
        for (i, one), (j, other) in combinations(enumerate(own), 2):
            sides = {**_row("examples", _examples(one, other)), **_row("weights", weights.get((i, j)))}
            if any(value is not None for value in sides.values()):
                rows.append({**one.described(), "other": other.method, **sides})
    return rows


def _row(side: str, counts: tuple[int, int, int] | None) -> dict[str, float | None]:
    """The figures of a side, from how many both choices have, how many either has, and how many there are."""
    if counts is None:
        return {side: None, f"{side}_by_chance": None}
    both, either, size = counts
    chosen = (both + either) / 2 / size
    return {side: both / either, f"{side}_by_chance": chosen / (2 - chosen)}


def _examples(one: Chosen, other: Chosen) -> tuple[int, int, int] | None:
    if one.budgets.data is None or one.budgets.data != other.budgets.data:
        return None
    return len(one.examples & other.examples), len(one.examples | other.examples), one.pool


def _weights(chosen: Sequence[Chosen]) -> dict[tuple[int, int], tuple[int, int, int]]:
    """The counts of masks of one model and one budget, by the positions of the two.

    Memory holds one tensor of each mask.
    """
    budgets = [one.budgets.parameters for one in chosen]
    shapes = [{name: one.mask[name].shape for name in one.mask} for one in chosen]
    pairs = combinations(range(len(chosen)), 2)
    alike = [(i, j) for i, j in pairs if budgets[i] is not None and (budgets[i], shapes[i]) == (budgets[j], shapes[j])]
    counts = {pair: np.zeros(3, dtype=int) for pair in alike}
    for name in dict.fromkeys(name for i, _ in alike for name in shapes[i]):
        own = [pair for pair in alike if name in shapes[pair[0]]]
        parts = {i: chosen[i].mask[name] for i in {i for pair in own for i in pair}}
        for i, j in own:
            counts[i, j] += [int((parts[i] & parts[j]).sum()), int((parts[i] | parts[j]).sum()), parts[i].numel()]
    return {pair: (int(both), int(either), int(size)) for pair, (both, either, size) in counts.items()}


def overlap_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `overlap_rows` in Markdown: means over seeds, with half of the 95% interval (Student's t)."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        key = (row["method"], row["other"], row["budget_data"], row["budget_parameters"])
        groups.setdefault(key, []).append(row)
    cells = [
        [f"{one} / {other}", as_given(data), as_given(weights), *(cell for s in _SIDES for cell in _cells(own, s))]
        for (one, other, data, weights), own in groups.items()
    ]
    return markdown_table([["methods", "data", "weights", *(h for s in _SIDES for h in (s, "by chance"))], *cells])


def _cells(rows: Sequence[Mapping[str, Any]], side: str) -> list[str]:
    """The mean overlap of a side, and that of random choices."""
    values = [row[side] for row in rows if row[side] is not None]
    if not values:
        return ["-", "-"]
    found = mean_interval(np.array(values))
    half = f" ± {found.high - found.value:.3f}" if found else ""
    return [f"{np.mean(values):.3f}{half}", f"{np.mean([row[f'{side}_by_chance'] for row in rows]):.3f}"]
