from typing import Any

import pytest
import torch

from dualsft.allocators import UniformPerLayer
from dualsft.errors import UserError
from tests.allocators.cases import best, budgets, entries, evenly, random_scores

GROUPS: list[dict[str, tuple[int, ...]]] = [
    {"h.0.w": (1, 1), "h.0.b": (2,)},
    {"h.2.w": (4,), "h.2.b": (2, 1)},
    {"h.10.w": (3, 2), "h.10.b": (2, 4)},
    {"head.weight": (2, 3), "embed.weight": (4,)},
]
"""Layers in order, then what is outside."""


@pytest.mark.parametrize("by", ["magnitude", "signed"])
@pytest.mark.parametrize("groups", [GROUPS, GROUPS[:3], GROUPS[3:]])
@pytest.mark.parametrize("seed", range(4))
def test_the_best_of_each_layer(seed: int, groups: list[dict[str, tuple[int, ...]]], by: Any) -> None:
    """For budgets from 1 to all, layers and what is outside take turns until all is spent, each its best."""
    shapes = {name: shape for group in reversed(groups) for name, shape in group.items()}
    scores = random_scores(seed, shapes)
    sizes = [sum(scores[name].numel() for name in group) for group in groups]
    for budget in budgets(sum(sizes), seed, by):
        parts = zip(groups, evenly(budget, sizes), strict=True)
        expected = set().union(*(best(scores, group, k, by) for group, k in parts))
        assert entries(UniformPerLayer(by).allocate(scores, budget), scores) == expected


def test_numbers_differ_by_one_at_most() -> None:
    """Layers that are large enough have the same number, the first of them one more."""
    scores = {f"layers.{n}.w": torch.randn(50) * 10**n for n in range(4)}
    mask = UniformPerLayer().allocate(scores, 42)
    assert [int(mask[f"layers.{n}.w"].sum()) for n in range(4)] == [11, 11, 10, 10]


def test_unknown_ranking_is_refused() -> None:
    """As everywhere, unless annotations are checked at run time, which is a refusal as well."""
    with pytest.raises((UserError, TypeError), match=r"'magnitude'.*'signed'"):
        UniformPerLayer("size")  # type: ignore[arg-type]
