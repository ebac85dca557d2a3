"""Each rule against a small case worked out by hand, whatever it is tuned to."""

import torch
from my_dualsft_plugin import MyExamples, MyPath, MyScorer, MyWeights

from dualsft import ParameterStatistics, ScoredExamples, ScoredParameters


def test_the_direction_has_the_parameter_s_shape_and_its_scale() -> None:
    """Twice the scale, twice the direction."""
    gradient = torch.tensor([[1.0, -2.0], [0.5, 4.0]])
    known = ParameterStatistics("w", torch.zeros(2, 2), gradient, torch.ones(2, 2), step_size=0.1, num_examples=10)
    once, twice = MyScorer().direction(known), MyScorer(scale=2.0).direction(known)
    torch.testing.assert_close(once, 0.01 * gradient)
    torch.testing.assert_close(twice, 2 * once)


class Counter:
    """A training that counts its steps."""

    stretches = (2, 1)

    def __init__(self) -> None:
        self.taken = 0

    def train(self, steps: int) -> None:
        """Count them."""
        self.taken += steps


def test_the_walk_yields_at_both_ends_of_each_piece() -> None:
    """The steps that were taken at each point."""
    training = Counter()
    assert [training.taken for _ in MyPath().walk(training)] == [0, 2, 3]


def test_the_data_budget_is_kept() -> None:
    """Ids are ascending, of the pool, and as many as were due; the best is among them."""
    examples = ScoredExamples(
        example_id=torch.tensor([2, 3, 5, 7]),
        score=torch.tensor([1.0, 9.0, 3.0, 9.0], dtype=torch.float64),
        num_tokens=torch.tensor([4, 4, 4, 4]),
        records=[{"text": "a"}] * 4,
    )
    assert MyExamples().allocate(examples, 1).tolist() == [3]
    assert MyExamples().allocate(examples, 3).tolist() == [3, 5, 7]


def test_the_parameter_budget_is_kept() -> None:
    """Over the whole model, the largest scores first."""
    scores = {"b": torch.tensor([3.0, -5.0]), "a": torch.tensor([[4.0], [1.0]])}
    weights = {name: torch.ones_like(score) for name, score in scores.items()}
    for budget, expected in ((1, [False, True, False, False]), (3, [True, True, True, False])):
        chosen = MyWeights().allocate(ScoredParameters(scores, weights), budget)
        assert [*chosen["b"].tolist(), *chosen["a"].flatten().tolist()] == expected
