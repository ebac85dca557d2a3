"""Overlaps of the choices of methods."""

import pytest
import torch

from dualsft.experiments.grid import Budgets
from dualsft.experiments.overlaps import overlap_rows, overlap_table
from tests.experiments.test_patterns import choice, random_masks


def test_overlaps_are_those_of_sets() -> None:
    """Both sides' figures are |A ∩ B| / |A ∪ B| of plain sets, seed by seed."""
    chosen = [
        choice(method, seed, random_masks(2 * seed + k), examples=frozenset(range(k, k + 5)))
        for seed in (0, 1)
        for k, method in enumerate(("a", "b"))
    ]
    rows = overlap_rows(chosen)
    assert [(row["method"], row["other"], row["seed"]) for row in rows] == [("a", "b", 0), ("a", "b", 1)]
    for row, one, other in zip(rows, chosen[::2], chosen[1::2], strict=True):
        sets = [
            {(n, i) for n in c.mask for i in c.mask[n].flatten().nonzero().flatten().tolist()} for c in (one, other)
        ]
        assert row["weights"] == pytest.approx(len(sets[0] & sets[1]) / len(sets[0] | sets[1]))
        assert row["examples"] == pytest.approx(4 / 6)
        assert row["examples_by_chance"] == pytest.approx(0.25 / 1.75)
    cells = overlap_table(rows).splitlines()[2].split("|")
    assert [cell.strip() for cell in cells[1:6]] == ["a / b", "5", "40%", "0.667 ± 0.000", "0.143"]


def test_random_masks_overlap_as_chance_has_it() -> None:
    """The figure that is given for chance is what large random masks of one density have."""
    masks = [{"w": torch.rand(400, 400, generator=torch.Generator().manual_seed(k)) < 0.3} for k in range(2)]
    (row,) = overlap_rows([choice("a", 0, masks[0]), choice("b", 0, masks[1])])
    assert row["weights"] == pytest.approx(row["weights_by_chance"], rel=0.03)


def test_only_like_is_compared() -> None:
    """Sides with other budgets, of other models, or of which all is taken have no overlap."""
    mask = random_masks(0)
    others = {
        "data only": choice("data only", 0, mask, budgets=Budgets(5, None)),
        "another model": choice("another model", 0, {"w": torch.ones(3, dtype=torch.bool)}),
        "more": choice("more", 0, mask, budgets=Budgets(6, 0.4)),
        "all of it": choice("all of it", 0, mask, budgets=Budgets(None, 0.3)),
    }
    rows = {name: overlap_rows([choice("both", 0, mask), other]) for name, other in others.items()}
    assert [(of[0]["examples"], of[0]["weights"]) for of in (rows["data only"], rows["another model"])] == [
        (1, None)
    ] * 2
    assert [(of["examples"], of["weights"]) for of in rows["more"]] == [(None, 1)]
    assert rows["all of it"] == []
