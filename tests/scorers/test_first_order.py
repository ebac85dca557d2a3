import torch

from dualsft.scorers import FirstOrder, ParameterStatistics


def statistics(v: torch.Tensor, p: torch.Tensor, step_size: float, num_examples: int) -> ParameterStatistics:
    """What is known of one parameter."""
    return ParameterStatistics("w", torch.zeros_like(v), v, p, step_size, num_examples)


def test_direction_is_the_preconditioned_validation_gradient() -> None:
    """U = (η/n) P ⊙ v, entry by entry."""
    v, p = torch.tensor([[1.0, -2.0], [0.0, 4.0]]), torch.tensor([[1.0, 0.5], [3.0, 2.0]])
    expected = torch.tensor([[0.25, -0.25], [0.0, 2.0]])
    torch.testing.assert_close(FirstOrder().direction(statistics(v, p, 0.5, 2)), expected)


def test_small_directions_survive() -> None:
    """At learning rate 2e-5 over a million examples small gradients keep a direction, which float16 would lose."""
    v = torch.tensor([1e-12, -1e-20])
    u = FirstOrder().direction(statistics(v, torch.ones(2), 2e-5, 1_000_000))
    torch.testing.assert_close(u, torch.tensor([2e-23, -2e-31]), rtol=1e-6, atol=0.0)
    assert not u.half().any()


def test_a_scorer_is_told_nothing_it_may_write_to() -> None:
    """The direction is a tensor of its own: v and P are what they were."""
    v, p = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    FirstOrder().direction(statistics(v, p, 0.1, 3)).zero_()
    assert (v.tolist(), p.tolist()) == ([1.0, 2.0], [3.0, 4.0])
