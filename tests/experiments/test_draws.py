"""Draws have an exact size, depend on their seed alone, and are what a full sort, or a uniform law, says they are."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dualsft.experiments.draws import (
    band_of_examples,
    band_of_weights,
    mixture,
    random_blocks,
)
from tests.allocators.cases import are_equally_likely, best, entries, random_scores

SHAPES = {"norm": (7,), "a.weight": (6, 5), "experts": (2, 3, 4), "scale": (), "empty": (0, 5), "none": (3, 0)}
TOTAL = 7 + 30 + 24 + 1


def zeros(shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    """An empty mask."""
    return {name: torch.zeros(shape, dtype=torch.bool) for name, shape in shapes.items()}


def chosen_mask() -> dict[str, Tensor]:
    """The mask of the highest 20 of random scores."""
    return band_of_weights(random_scores(0, SHAPES), 20, 0, 2)


DRAWS: dict[str, Callable[[int], Any]] = {
    "rows": partial(random_blocks, SHAPES, 10),
    "modules": partial(random_blocks, SHAPES, 10, block="module"),
    "mixture": partial(mixture, chosen_mask(), 0.5),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
def test_the_seed_decides(draw: Callable[[int], Any]) -> None:
    """One seed draws the same again, another seed others; torch's global generator has no part in it."""
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = draw(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    again, other = draw(1), draw(2)
    if isinstance(first, dict):
        first, again, other = (entries(mask, zeros()) for mask in (first, again, other))
    assert first == again != other


@pytest.mark.parametrize(("count", "bands"), [(1, 2), (7, 3), (10, 10), (31, 4), (70, 5), (100, 2)])
def test_bands_of_examples_are_slices_of_the_ranking(count: int, bands: int) -> None:
    """Each has the same size; the first is the best, the last the lowest, and ties go to the earlier id."""
    generator = torch.Generator().manual_seed(count)
    values = (torch.randn(100, generator=generator) * 3).round().tolist()
    scores = dict(zip(torch.randperm(100, generator=generator).tolist(), values, strict=True))
    ranking = [i for _, i in sorted((-score, i) for i, score in scores.items())]
    found = [band_of_examples(scores, count, band, bands) for band in range(bands)]
    for band, ids in enumerate(found):
        first = round(band * (100 - count) / (bands - 1))
        assert ids == sorted(ranking[first : first + count])
    assert found[0] == sorted(ranking[:count])
    assert found[-1] == sorted(ranking[-count:])


def test_ten_bands_of_a_tenth_are_the_deciles() -> None:
    """They part the pool."""
    found = [band_of_examples({i: -float(i) for i in range(100)}, 10, band, 10) for band in range(10)]
    assert found == [list(range(10 * band, 10 * band + 10)) for band in range(10)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("count", "bands"), [(1, 2), (6, 10), (25, 3), (TOTAL, 2)])
def test_bands_of_weights_are_slices_of_a_full_sort(seed: int, count: int, bands: int) -> None:
    """Ranked by magnitude over all tensors; ties go to the first name, then the first index."""
    scores = random_scores(seed, SHAPES)
    for band in range(bands):
        first = round(band * (TOTAL - count) / (bands - 1))
        due = best(scores, scores, first + count, "magnitude") - best(scores, scores, first, "magnitude")
        assert entries(band_of_weights(scores, count, band, bands), scores) == due


def blocks(block: str) -> list[set[tuple[str, int]]]:
    """The blocks of all tensors, as sets of entries."""
    found = []
    for name, shape in SHAPES.items():
        indices = torch.arange(torch.Size(shape).numel())
        parts = indices.view(-1, shape[-1]) if block == "row" and len(shape) > 1 and len(indices) else [indices]
        found += [{(name, index) for index in part.tolist()} for part in parts if len(part)]
    return found


@pytest.mark.parametrize("block", ["row", "module"])
def test_random_blocks_are_whole_but_for_one(block: Any) -> None:
    """The count is exact, and of one block at most a part is drawn: a run of neighbours."""
    for seed, count in enumerate(range(TOTAL + 1)):
        drawn = entries(random_blocks(SHAPES, count, seed, block), zeros())
        assert len(drawn) == count
        cut = [part for unit in blocks(block) if (part := unit & drawn) not in (set(), unit)]
        assert len(cut) <= 1
        for part in cut:
            places = sorted(index for _, index in part)
            assert places == list(range(places[0], places[0] + len(places)))


def test_random_blocks_are_drawn_equally_often() -> None:
    """The first row taken is each of six equally often, and a run of two in a row of three starts at either place."""
    shapes = {"a": (4, 3), "b": (2, 3)}
    draws = [frozenset(entries(random_blocks(shapes, 2, seed), zeros(shapes))) for seed in range(2400)]
    assert are_equally_likely(200, draws, outcomes=12)


def test_mixtures_keep_the_count_and_a_share() -> None:
    """Of the mask's weights the share stays, rounded, and as many as go come from outside."""
    mask = chosen_mask()
    for share, kept in ((0.0, 0), (0.33, 7), (0.5, 10), (1.0, 20)):
        mixed = entries(mixture(mask, share, 3), mask)
        assert len(mixed) == 20
        assert len(mixed & entries(mask, mask)) == kept


def test_mixtures_are_uniform() -> None:
    """Which weight stays and which comes are independent, and each is equally likely."""
    mask = {"a": torch.tensor([True, False, True]), "b": torch.tensor([False, False])}
    draws = [frozenset(entries(mixture(mask, 0.5, seed), mask)) for seed in range(180)]
    assert are_equally_likely(30, draws, outcomes=6)


MISTAKES: dict[str, Callable[[], Any]] = {
    "more weights than blocks hold": lambda: random_blocks(SHAPES, TOTAL + 1, 0),
    "no weights left outside": lambda: mixture({"a": torch.ones(4, dtype=torch.bool)}, 0.5, 0),
    "band beyond the last": lambda: band_of_examples({1: 0.0}, 1, 2, 2),
    "a single band": lambda: band_of_examples({1: 0.0}, 1, 0, 1),
    "a band of more than all": lambda: band_of_weights(random_scores(0, SHAPES), TOTAL + 1, 0, 2),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_what_cannot_be_drawn_is_refused(mistake: Callable[[], Any]) -> None:
    """No draw is smaller than asked for."""
    with pytest.raises(ValueError, match=r"cannot choose|there is no band"):
        mistake()
