"""Magnitude and SIFT, on parameters made by hand; and what they are made of."""

from collections import Counter

import pytest
import torch
from baseline_cases import chosen, is_mask_of, parameters, subset
from dualsft_baselines import Magnitude, Sift, ranking, sampling
from dualsft_baselines.ranking import largest_entries
from torch import Tensor

from dualsft import ParameterStatistics, UserError


def some_weights(seed: int = 0) -> dict[str, Tensor]:
    """Weights of a few shapes and types, many of them equal."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"b": (4, 5), "a": (7,), "c": (2, 3, 4), "d": ()}
    weights = {name: torch.randint(-6, 7, shape, generator=generator) / 4 for name, shape in shapes.items()}
    return {**weights, "c": weights["c"].bfloat16()}


@pytest.mark.parametrize(("size", "count"), [(5, 2), (5, 3), (4, 1), (4, 4), (3, 0)])
def test_every_subset_is_equally_likely(size: int, count: int) -> None:
    """Over 2,000 seeds each subset comes as often as any other, within four standard deviations."""
    draws = 2000
    found = Counter(subset(size, count, seed) for seed in range(draws))
    expected = dict.fromkeys(map(tuple, torch.combinations(torch.arange(size), count).tolist()), 0) or {(): 0}
    assert found.keys() == expected.keys()
    share = 1 / len(expected)
    spread = 4 * (draws * share * (1 - share)) ** 0.5
    assert all(abs(times - draws * share) <= spread for times in found.values())


def test_draws_in_several_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn a few at a time, there are still exactly as many, and the first and the last half are chosen alike."""
    monkeypatch.setattr(sampling, "_AT_ONCE", 7)
    for count in (0, 1, 50, 333, 999, 1000):
        drawn = sampling.random_entries(1000, count, torch.Generator().manual_seed(count))
        assert int(drawn.sum()) == count
        assert abs(int(drawn[:500].sum()) - count / 2) <= 40


def slowly_largest(weights: dict[str, Tensor], budget: int, sign: int) -> set[tuple[str, int]]:
    """By sorting all entries by key, name and index."""
    entries = [(-sign * abs(float(w)), n, k) for n, t in weights.items() for k, w in enumerate(t.flatten())]
    return {(name, k) for _, name, k in sorted(entries)[:budget]}


@pytest.mark.parametrize(("keep", "sign"), [("largest", 1), ("smallest", -1)])
def test_magnitude_equals_a_sort_of_all_entries(keep: str, sign: int) -> None:
    """For every budget, ties by name and index included; in every floating type."""
    weights = some_weights()
    scores = parameters(weights)
    for budget in range(1, sum(w.numel() for w in weights.values()) + 1):
        mask = Magnitude(keep).allocate(scores, budget)  # type: ignore[arg-type]
        assert is_mask_of(mask, scores, budget)
        assert chosen(mask) == slowly_largest(weights, budget, sign)


def test_magnitude_does_not_touch_the_weights() -> None:
    """They are the model's own."""
    weights = some_weights()
    before = {name: weight.clone() for name, weight in weights.items()}
    Magnitude().allocate(parameters(weights), 9)
    assert all(torch.equal(weights[name], before[name]) for name in weights)


def test_mistakes_are_told() -> None:
    """An unknown option with the allowed ones; a weight that is not a number with its parameter."""
    with pytest.raises(UserError, match="keeps the 'largest' or the 'smallest' weights, not the 'middle'"):
        Magnitude("middle")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="odd cannot be ranked, as some of its entries are not a number"):
        Magnitude().allocate(parameters({"odd": torch.tensor([1.0, float("nan")])}), 1)


def test_no_more_keys_are_held_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the threshold is sought, at most twice as many keys as are to be chosen are together."""
    together: list[int] = []
    concatenate = torch.cat

    def watched(tensors: list[Tensor]) -> Tensor:
        together.append(sum(len(t) for t in tensors))
        return concatenate(tensors)

    monkeypatch.setattr(ranking.torch, "cat", watched)
    keys = {str(k): torch.arange(100.0) for k in range(5)}
    assert sum(int(m.sum()) for m in largest_entries(keys, keys.__getitem__, 10).values()) == 10
    assert len(together) == 5
    assert max(together) == 20


def test_sift_scores_a_weight_by_its_gradient() -> None:
    """u_j Σ_i g_ij is |ḡ_j|, whatever the validation gradient, the step size and the preconditioner."""
    gradients = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients[:, 0, 0] = 0
    rest = (torch.ones(3, 4, dtype=torch.float64), torch.randn(3, 4).double(), torch.rand(3, 4).double())
    known = ParameterStatistics("w", *rest, step_size=0.1, num_examples=5, pool_gradient=gradients.mean(0))
    u = Sift().direction(known)
    torch.testing.assert_close(u * gradients.sum(0), gradients.mean(0).abs(), rtol=1e-12, atol=0)
    assert tuple(Sift().needs) == ("pool_gradient",)
