"""The data allocators beside top-k, each against the slow obvious way to the same choice."""

import random
from collections import Counter
from itertools import combinations
from typing import Any

import pytest
import torch

from dualsft.allocators import PerSourceQuota, PositiveOnly, ScoredExamples, TokenBudget
from dualsft.allocators.token_budget import knapsack
from dualsft.errors import UserError


def pool(scores: list[float], tokens: list[int], sources: list[Any] | None = None) -> ScoredExamples:
    """Examples with ids 10, 20, ..."""
    records = [{"source": source, "text": "x"} for source in sources or [None] * len(scores)]
    ids = torch.arange(1, len(scores) + 1) * 10
    return ScoredExamples(ids, torch.tensor(scores, dtype=torch.float64), torch.tensor(tokens), records)


@pytest.mark.parametrize("seed", range(40))
def test_a_token_budget_buys_the_most_score(seed: int) -> None:
    """No subset within the tokens has a higher total, and no example without a positive score is taken."""
    draw = random.Random(seed)
    scores = [draw.choice([draw.uniform(-1, 2), 0.5, 0.0]) for _ in range(9)] + [1.0]
    tokens = [draw.randrange(1, 9) for _ in scores]
    budget = draw.randrange(9, 45)
    chosen = [int(i) // 10 - 1 for i in TokenBudget().allocate(pool(scores, tokens), budget)]
    assert chosen == sorted(chosen)
    assert sum(tokens[k] for k in chosen) <= budget
    assert all(scores[k] > 0 for k in chosen)
    subsets = [s for n in range(11) for s in combinations(range(10), n) if sum(tokens[k] for k in s) <= budget]
    best = max(sum(scores[k] for k in s) for s in subsets)
    assert sum(scores[k] for k in chosen) == pytest.approx(best, abs=1e-12)


def test_a_large_token_budget_is_near_the_bound() -> None:
    """On 20,000 examples with a core of a few, the total is within one part in 10,000 of the linear relaxation's."""
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(20_000, generator=generator, dtype=torch.float64).numpy() + 1e-3
    tokens = torch.randint(1, 500, (20_000,), generator=generator).numpy()
    taken = knapsack(score, tokens, 400_000, cells=200_000)
    assert tokens[taken].sum() <= 400_000
    order = (-score / tokens).argsort()
    spent = tokens[order].cumsum()
    whole = int((spent <= 400_000).sum())
    bound = score[order[:whole]].sum() + score[order[whole]] * (400_000 - spent[whole - 1]) / tokens[order[whole]]
    assert (1 - 1e-4) * bound <= score[taken].sum() <= bound


@pytest.mark.parametrize(
    ("scores", "tokens", "told"),
    [([-1.0, 0.0], [1, 1], "has a positive score"), ([1.0, 2.0], [8, 9], "has 8; raise it")],
)
def test_a_token_budget_that_buys_nothing_is_refused(scores: list[float], tokens: list[int], told: str) -> None:
    """It is said whether no score is positive or nothing fits."""
    with pytest.raises(UserError, match=told):
        TokenBudget().allocate(pool(scores, tokens), 7)


@pytest.mark.parametrize("budget", range(1, 6))
def test_positive_only_takes_no_other(budget: int) -> None:
    """The highest positive scores, ties to the earlier row, and fewer than the budget where there are fewer."""
    examples = pool([1.0, -2.0, 3.0, 0.0, 1.0], [1] * 5)
    ranked = [30, 10, 50][:budget]
    assert PositiveOnly().allocate(examples, budget).tolist() == sorted(ranked)


def test_positive_only_without_a_positive_score_is_refused() -> None:
    """An empty choice is no choice."""
    with pytest.raises(UserError, match=r"None of the 2 examples .* has a positive score"):
        PositiveOnly().allocate(pool([-1.0, 0.0], [1, 1]), 1)


@pytest.mark.parametrize("shares", ["proportional", "equal", {"a": 1, "b": 3.0}])
@pytest.mark.parametrize("seed", range(5))
def test_each_source_gives_its_best(seed: int, shares: Any) -> None:
    """For every budget it is spent exactly, and what a source gives are its own highest scores, earlier rows first."""
    draw = random.Random(seed)
    sources = ["a", "b", *(draw.choice(["a", "b", "c", 7, None]) for _ in range(18))]
    scores = [float(draw.randrange(5)) for _ in sources]
    for budget in range(1, 21):
        found = PerSourceQuota(shares=shares).allocate(pool(scores, [1] * 20, sources), budget)
        chosen = [int(i) // 10 - 1 for i in found]
        assert len(set(chosen)) == budget
        for source, count in Counter(sources[k] for k in chosen).items():
            ranked = sorted((k for k in range(20) if sources[k] == source), key=lambda k: (-scores[k], k))
            assert [k for k in chosen if sources[k] == source] == sorted(ranked[:count])


def test_quotas_are_the_shares() -> None:
    """With room in every source, the parts are those asked for."""
    examples = pool([0.0] * 60, [1] * 60, ["a"] * 10 + ["b"] * 20 + ["c"] * 30)
    for shares, parts in (
        ("proportional", (2, 4, 6)),
        ("equal", (4, 4, 4)),
        ({"a": 1.0, "c": 0.5}, (8, 0, 4)),
    ):
        found = PerSourceQuota(shares=shares).allocate(examples, 12).tolist()  # type: ignore[arg-type]
        assert tuple(sum(lo < i <= hi for i in found) for lo, hi in ((0, 100), (100, 300), (300, 600))) == parts


def test_sources_that_do_not_occur_are_refused() -> None:
    """A column that no record has, a source that does not occur, and shares that say nothing."""
    with pytest.raises(UserError, match=r"finds no column 'topic' in row 10 of .* \(the record has source, text"):
        PerSourceQuota("topic").allocate(pool([1.0], [1]), 1)
    with pytest.raises(UserError, match=r"gives a share to 'z', but column 'source' of data.train holds 'a'"):
        PerSourceQuota(shares={"z": 1.0}).allocate(pool([1.0], [1], ["a"]), 1)
    with pytest.raises(UserError, match="no positive share"):
        PerSourceQuota(shares={"a": 0.0})
