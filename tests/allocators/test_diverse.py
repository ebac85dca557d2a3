import pytest
import torch
from torch import Tensor

from dualsft.allocators import Diverse, ScoredExamples


def pool(scores: Tensor, sketch: Tensor) -> ScoredExamples:
    """Examples with ids 10, 20, ..."""
    ids = torch.arange(1, len(scores) + 1) * 10
    return ScoredExamples(ids, scores, torch.ones_like(ids), [{} for _ in ids], sketch=sketch)


def slow_greedy(scores: Tensor, sketch: Tensor, budget: int) -> list[int]:
    """The definition: of all examples the one that raises F most, time after time, then the rest by score."""
    likeness = torch.nn.functional.cosine_similarity(sketch[:, None].double(), sketch[None].double(), dim=2).clamp(0, 1)
    useful = [k for k in range(len(scores)) if scores[k] > 0]

    def value(chosen: list[int]) -> float:
        return sum(float(scores[i] * max(likeness[i, k] for k in chosen)) for i in useful) if chosen else 0.0

    picked: list[int] = []
    while len(picked) < min(budget, len(useful)):
        picked.append(max((k for k in useful if k not in picked), key=lambda k: value([*picked, k])))
    rest = sorted((k for k in range(len(scores)) if k not in picked), key=lambda k: -float(scores[k]))
    return sorted(10 * (k + 1) for k in [*picked, *rest][:budget])


@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_greedy_choice(seed: int) -> None:
    """For several budgets, what is chosen is what raising F greedily over all examples chooses, by its definition."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(14, generator=generator, dtype=torch.float64)
    sketch = torch.randn(14, 5, generator=generator)
    for budget in (1, 3, 6, 14):
        assert Diverse().allocate(pool(scores, sketch), budget).tolist() == slow_greedy(scores, sketch, budget)


def test_lazy_gains_choose_what_all_gains_would() -> None:
    """With far more examples than are looked at together, the choice is that of computing every gain each time."""
    generator = torch.Generator().manual_seed(5)
    scores = torch.rand(300, generator=generator, dtype=torch.float64)
    sketch = torch.randn(300, 6, generator=generator)
    units = torch.nn.functional.normalize(sketch.double())
    likeness, covered = (units @ units.t()).clamp(0, 1), torch.zeros(300, dtype=torch.float64)
    picked: list[int] = []
    for _ in range(40):
        gains = ((likeness - covered).clamp(min=0) * scores).sum(1)
        gains[picked] = -1
        picked.append(int(gains.argmax()))
        covered = torch.maximum(covered, likeness[picked[-1]])
    assert Diverse().allocate(pool(scores, sketch), 40).tolist() == sorted(10 * (k + 1) for k in picked)


def test_copies_of_one_example_wait_for_the_others() -> None:
    """Of several equal gradients one is chosen before anything that adds to it; the earliest of equals."""
    sketch = torch.eye(4)[[0, 0, 0, 1, 2]]
    scores = torch.tensor([3.0, 3.0, 3.0, 1.0, 0.5], dtype=torch.float64)
    assert Diverse().allocate(pool(scores, sketch), 3).tolist() == [10, 40, 50]
    assert Diverse().allocate(pool(scores, sketch), 4).tolist() == [10, 20, 40, 50]


def test_what_adds_nothing_follows_by_score() -> None:
    """The budget is spent exactly, also with gradients of zero and scores that are not positive."""
    sketch = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    scores = torch.tensor([2.0, -1.0, 1.0, -3.0], dtype=torch.float64)
    chosen = [Diverse().allocate(pool(scores, sketch), budget).tolist() for budget in range(1, 5)]
    assert chosen == [[30], [10, 30], [10, 20, 30], [10, 20, 30, 40]]
