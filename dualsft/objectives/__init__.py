"""The terms of V(θ), and the loss of one example, which is also what pool examples are scored by."""

from dualsft.objectives.likelihood import example_losses, token_losses

__all__ = ["example_losses", "token_losses"]
