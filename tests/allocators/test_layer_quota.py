from typing import Any

import pytest
import torch
from torch import Tensor

from dualsft.allocators import LayerQuota
from dualsft.errors import UserError
from tests.allocators.cases import best, budgets, entries, evenly, random_scores

LAYERS: dict[str, dict[str, tuple[int, ...]]] = {
    "h.10": {"h.10.attn.q_proj.weight": (3, 2), "h.10.mlp.up_proj.weight": (2, 4)},
    "h.2": {"h.2.mlp.up_proj.weight": (4,), "h.2.norm.weight": (2,)},
    "h.0": {"h.0.attn.q_proj.weight": (1, 1), "h.0.attn.q_proj.bias": (2,)},
}
OUTSIDE: dict[str, tuple[int, ...]] = {"head.weight": (2, 3), "embed.weight": (4,)}
SHAPES = {**OUTSIDE, **LAYERS["h.10"], **LAYERS["h.2"], **LAYERS["h.0"]}
TOTAL = 33
IN_ORDER = [list(LAYERS[layer]) for layer in ("h.0", "h.2", "h.10")]
KINDS = [
    ["h.10.attn.q_proj.weight", "h.0.attn.q_proj.weight", "h.0.attn.q_proj.bias"],
    ["h.10.mlp.up_proj.weight", "h.2.mlp.up_proj.weight"],
    ["head.weight", "embed.weight", "h.2.norm.weight"],
]


def reference(scores: dict[str, Tensor], budget: int, parts: tuple[int, int], by: str) -> set[tuple[str, int]]:
    """Three steps of sorts."""
    taken: set[tuple[str, int]] = set()
    for groups, part in zip((IN_ORDER, KINDS), parts, strict=True):
        free = [sum(scores[n].numel() for n in names) - sum(n in names for n, _ in taken) for names in groups]
        step = [best(scores, names, k, by, taken) for names, k in zip(groups, evenly(part, free), strict=True)]
        taken = taken.union(*step)
    return taken | best(scores, scores, budget - len(taken), by, taken)


@pytest.mark.parametrize("by", ["magnitude", "signed"])
@pytest.mark.parametrize(
    ("seed", "layer_share", "module_share"),
    [(0, 0.29, 0.57), (1, 0.2, 0.2), (2, 0.0, 0.5), (3, 0.7, 0.3), (5, 1.0, 0.0)],
)
def test_floors_then_the_best(seed: int, layer_share: float, module_share: float, by: Any) -> None:
    """For budgets from 1 to all: layers' parts, then kinds' of what is left, then the best, by sorts."""
    hundredths = (round(100 * layer_share), round(100 * module_share))
    scores = random_scores(seed, SHAPES)
    for budget in budgets(TOTAL, seed, by):
        mask = LayerQuota(layer_share, module_share, by).allocate(scores, budget)
        parts = (budget * hundredths[0] // 100, budget * hundredths[1] // 100)
        assert entries(mask, scores) == reference(scores, budget, parts, by)


def test_no_floors_is_a_plain_ranking() -> None:
    """Without shares the best of the whole model are chosen."""
    scores = random_scores(1, SHAPES)
    for budget in budgets(TOTAL):
        assert entries(LayerQuota(0.0, 0.0).allocate(scores, budget), scores) == best(
            scores, scores, budget, "magnitude"
        )


def test_every_layer_and_kind_has_its_floor() -> None:
    """However low the scores are, a layer has its part of a fifth, and a kind its part of another fifth, by default."""
    value = {"h.0.q_proj.weight": 4.0, "h.0.k_proj.weight": 3.0, "h.1.q_proj.weight": 2.0, "h.1.k_proj.weight": 1.0}
    scores = {name: torch.full((20,), x) for name, x in value.items()}
    scores["head.weight"] = torch.full((100,), 9.0)
    mask = LayerQuota().allocate(scores, 60)
    assert {name: int(chosen.sum()) for name, chosen in mask.items()} == {
        "h.0.q_proj.weight": 6 + 4,  # the layer's half of 12, the kind's third of 12
        "h.1.q_proj.weight": 6,
        "h.0.k_proj.weight": 4,
        "h.1.k_proj.weight": 0,
        "head.weight": 4 + 36,
    }


def test_models_without_layers_are_ranked_as_a_whole() -> None:
    """What no layer can take goes to the best of the model."""
    scores = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([-3.0])}
    assert entries(LayerQuota(1.0, 0.0).allocate(scores, 2), scores) == {("a", 1), ("b", 0)}


@pytest.mark.parametrize("shares", [(-0.1, 0.2), (0.2, 1.1), (float("nan"), 0.0), (0.0, float("inf"))])
def test_shares_outside_of_the_budget_are_refused(shares: tuple[float, float]) -> None:
    """A share is from 0 to 1; the one that is not is named."""
    key = "module_share" if shares[0] in (0.0, 0.2) else "layer_share"
    with pytest.raises(UserError, match=rf"^{key} of layer_quota is \S+; give a part of the budget from 0 to 1\.$"):
        LayerQuota(*shares)


def test_shares_above_the_budget_are_refused() -> None:
    """Together they are at most 1, in decimal."""
    LayerQuota(0.9, 0.1)
    LayerQuota(0.35, 0.65)
    with pytest.raises(UserError, match=r"layer_share 0\.7 and module_share 0\.31 of layer_quota add up to more"):
        LayerQuota(0.7, 0.31)


def test_unknown_ranking_is_refused() -> None:
    """As everywhere, unless annotations are checked at run time, which is a refusal as well."""
    with pytest.raises((UserError, TypeError), match=r"'magnitude'.*'signed'"):
        LayerQuota(by="size")  # type: ignore[arg-type]
