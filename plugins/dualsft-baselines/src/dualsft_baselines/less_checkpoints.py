"""Σ_k η_k <v_k, P_k ⊙ g_i(θ_k)> / (‖v_k‖ ‖P_k ⊙ g_i(θ_k)‖) over the checkpoints θ_k after each epoch of the warm-up.

Source: Xia, Malladi, Gururangan, Arora, Chen, "LESS: Selecting Influential Data for Targeted Instruction Tuning", arXiv
2402.04333 (2024). `dualsft_baselines.less` is the same at one checkpoint.

What differs from LESS: exact gradients of all weights, where it has random projections of LoRA gradients; no momentum
in the Adam step, only P = 1/(sqrt(ĉ)+eps); a constant learning rate; one validation gradient for each set, where it
takes the best of several subtasks (`model.combination` max does, with the subtasks as validation sets).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from dualsft import PathTraining, Piece, PieceRows, ScoringPath


class LessCheckpoints(ScoringPath):
    """How nearly the examples' Adam steps point along the validation gradient, summed over the warm-up's epochs (LESS).

    Goes with the preconditioner adam. An example without any gradient has cosine 0. Weights are scored by the steps
    themselves, Σ_k η_k (P_k ⊙ v_k)_j Σ_i g_ij(θ_k), as cosines have no share for a weight.
    """

    trains_on = "pool"
    needs = ("statistics",)
    needs_of_examples = ("preconditioned_gradient_norm",)

    def walk(self, training: PathTraining) -> Iterator[None]:
        """One piece for each epoch, whatever the number of pieces."""
        yield
        for _ in range(training.epochs):
            training.train(training.steps // training.epochs)
            yield

    def direction(self, piece: Piece) -> Tensor:
        """η P ⊙ v at the end of the epoch, of the parameter's shape."""
        assert piece.statistics is not None
        return piece.learning_rate * piece.statistics.preconditioner * piece.statistics.validation_gradient

    def contribution(self, rows: PieceRows) -> Tensor:
        """η times the cosine of each example."""
        assert rows.validation_norm is not None
        assert rows.preconditioned_gradient_norm is not None
        norms = rows.validation_norm * rows.preconditioned_gradient_norm
        return torch.where(norms > 0, rows.score / norms, 0.0)
