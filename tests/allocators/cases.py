"""Scores with ties and special values, and the slow obvious way to rank them."""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualsft.allocators import ScoredExamples

SPECIAL = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-45, -1e-45, 1e-39, 3.4e38, -3.4e38, 1.0, -1.0, 1.0])


def random_scores(seed: int, shapes: Mapping[str, Sequence[int]], kinds: int = 4) -> dict[str, Tensor]:
    """Tensors of these shapes: of random values, of many ties, of wide range, of special values (the seed decides)."""
    generator = torch.Generator().manual_seed(seed)

    def values(shape: Sequence[int]) -> Tensor:
        normal = torch.randn(tuple(shape), generator=generator)
        kind = seed % kinds
        if kind == 0:
            return normal
        if kind == 1:
            return (normal * 2).round()
        if kind == 2:
            return normal * 10.0 ** torch.randint(-44, 38, tuple(shape), generator=generator)
        return SPECIAL[torch.randint(len(SPECIAL), tuple(shape), generator=generator)]

    return {name: values(shape) for name, shape in shapes.items()}


def scored(
    values: Tensor | np.ndarray | Sequence[float],
    tokens: np.ndarray | Sequence[int] | None = None,
    records: Sequence[Mapping[str, Any]] | None = None,
) -> ScoredExamples:
    """Examples with ids 10, 20, ... and these scores; of one token each, with empty records, if nothing is given."""
    score = values if isinstance(values, Tensor) else torch.as_tensor(values, dtype=torch.float64)
    ids = torch.arange(1, len(score) + 1) * 10
    lengths = torch.ones_like(ids) if tokens is None else torch.as_tensor(tokens)
    return ScoredExamples(ids, score, lengths, [{} for _ in ids] if records is None else records)


def budgets(total: int, *case: Any) -> list[int]:
    """Budgets from 1 to all: both ends, and six at random, which are others in each case."""
    draw = random.Random(repr(case))
    return sorted({1, total, *draw.sample(range(1, total + 1), min(6, total))})


def value_of(score: float, by: str) -> float:
    """What an entry is ranked by."""
    return abs(score) if by == "magnitude" else score


def best(
    scores: Mapping[str, Tensor],
    names: Iterable[str],
    k: int,
    by: str,
    taken: Iterable[tuple[str, int]] = (),
    reverse: bool = False,
) -> set[tuple[str, int]]:
    """The best k entries of these tensors that are not taken, by a sort over (score, name, flat index)."""
    taken, sign = set(taken), 1 if reverse else -1
    entries = [
        (sign * value_of(score, by), name, index)
        for name in names
        for index, score in enumerate(scores[name].flatten().tolist())
        if (name, index) not in taken
    ]
    return {(name, index) for _, name, index in sorted(entries)[:k]}


def evenly(budget: int, capacities: Sequence[int]) -> list[int]:
    """A budget dealt out one by one, round after round, to those that can take more."""
    parts = [0] * len(capacities)
    while budget and any(part < capacity for part, capacity in zip(parts, capacities, strict=True)):
        for k, capacity in enumerate(capacities):
            if budget and parts[k] < capacity:
                parts[k] += 1
                budget -= 1
    return parts


def entries(mask: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> set[tuple[str, int]]:
    """What a mask chooses; it must be boolean, for every tensor, of its shape."""
    assert {name: chosen.shape for name, chosen in mask.items()} == {n: s.shape for n, s in scores.items()}
    assert all(chosen.dtype == torch.bool for chosen in mask.values())
    return {(name, index) for name in mask for index in mask[name].flatten().nonzero().flatten().tolist()}


def are_equally_likely(expected: float, draws: Sequence[Any], outcomes: int) -> bool:
    """Whether outcomes are equally likely: χ² is within five standard deviations of its mean, and none is missing."""
    counts = Counter(draws)
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    freedom = outcomes - 1
    return len(counts) == outcomes and abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5
