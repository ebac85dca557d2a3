"""Losses: l_i of one example, by which pool examples are scored, and the terms of V(θ).

In: a model and a batch. Out: one differentiable loss per example.
"""

from dualsft.objectives.base import Objective
from dualsft.objectives.likelihood import example_losses, supervised_losses, token_losses
from dualsft.objectives.prior import SelfDistillation

__all__ = ["Objective", "SelfDistillation", "example_losses", "supervised_losses", "token_losses"]
