"""Random choices have an exact size, depend on their seed alone, and all are equally likely."""

import pytest
import torch

from dualsft.allocators import RandomExamples, RandomWeights, ScoredParameters
from dualsft.allocators.random import random_examples, random_weights
from dualsft.selection.warmup import Warmup
from tests.allocators.cases import are_equally_likely, entries, random_scores, scored

SHAPES = {"norm": (7,), "a.weight": (6, 5), "experts": (2, 3, 4), "scale": (), "empty": (0, 5), "none": (3, 0)}
TOTAL = 7 + 30 + 24 + 1


def test_random_examples_are_uniform() -> None:
    """Each pair of five is drawn equally often, ascending."""
    draws = [tuple(random_examples([3, 1, 4, 7, 5], 2, seed)) for seed in range(2000)]
    assert all(a < b for a, b in draws)
    assert are_equally_likely(200, draws, outcomes=10)


def test_a_control_is_independent_of_the_warm_up() -> None:
    """By one seed both draw from one pool: as many rows are in both as chance has it, a tenth of a tenth."""
    pool, shared = list(range(1000)), 0
    for seed in range(20):
        shared += len({*random_examples(pool, 100, seed)} & {*Warmup(fraction=0.1).draw(pool, seed)})
    assert 150 < shared < 250  # 200 are expected, with a standard deviation of 12.7


def test_random_weights_are_uniform() -> None:
    """Each pair of four weights in two tensors is drawn equally often."""
    like = {"a": torch.zeros(1, 3), "b": torch.zeros(())}
    draws = [frozenset(entries(random_weights(like, 2, seed), like)) for seed in range(300)]
    assert are_equally_likely(50, draws, outcomes=6)


def test_random_weights_depend_on_shapes_alone() -> None:
    """Neither the order of the mapping nor its values have a part in them, nor torch's global generator."""
    scores, state = random_scores(0, SHAPES), torch.get_rng_state()
    reverse = {name: -score for name, score in reversed(scores.items())}
    for count in (0, 1, 30, TOTAL):
        drawn = entries(random_weights(scores, count, 4), scores)
        assert len(drawn) == count
        assert drawn == entries(random_weights(reverse, count, 4), scores)
    assert torch.equal(torch.get_rng_state(), state)


def test_allocators_draw_by_their_seed() -> None:
    """One seed chooses the same again, another seed others, exactly as many as the budget says, whatever the scores."""
    low, high = scored(range(30)), scored([0.0] * 30)
    weights = ScoredParameters(random_scores(0, SHAPES))
    chosen = RandomExamples(1).allocate(low, 10).tolist()
    assert len(chosen) == 10
    assert chosen == RandomExamples(1).allocate(high, 10).tolist() != RandomExamples(2).allocate(low, 10).tolist()
    assert set(chosen) <= set(low.example_id.tolist())
    masks = [entries(RandomWeights(seed).allocate(weights, 20), weights) for seed in (1, 1, 2)]
    assert masks[0] == masks[1] != masks[2]
    assert len(masks[0]) == 20


def test_too_many_are_refused() -> None:
    """No draw is smaller than asked for."""
    with pytest.raises(ValueError, match="cannot choose 3 of 2 examples"):
        random_examples([1, 2], 3, 0)
    with pytest.raises(ValueError, match="cannot choose"):
        random_weights(random_scores(0, SHAPES), TOTAL + 1, 0)
