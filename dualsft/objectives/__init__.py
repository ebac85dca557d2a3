"""The terms of V(θ), and the loss of one example, which is also what pool examples are scored by."""

from dualsft.objectives.base import Objective
from dualsft.objectives.likelihood import (
    example_losses,
    mean_over_tokens,
    supervised_logits,
    supervised_losses,
    token_losses,
)
from dualsft.objectives.prior import Prior, SelfDistillation

__all__ = [
    "Objective",
    "Prior",
    "SelfDistillation",
    "example_losses",
    "mean_over_tokens",
    "supervised_logits",
    "supervised_losses",
    "token_losses",
]
