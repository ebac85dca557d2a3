"""The options under ``model.path.``: the path along which the pool is scored, in place of one scoring checkpoint."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from dualsft.errors import UserError
from dualsft.matrix.quadrature import Rule
from dualsft.paths import ScoringPath
from dualsft.selection.dense_training import OptimizerName

Columns = Literal["target", "pool", "product"]
Normalization = Literal["none", "initial_loss", "smoothed_loss", "length"]
EPOCHS = 16
"""Epochs of a path along the target, unless they are given."""


@dataclass(frozen=True)
class PathSettings:
    """The path along which weights and examples are scored.

    Args:
        along: target trains on the validation set, from the warm-up's end on, and scores by what that does to the pool;
            pool adds up the scorer's scores at several checkpoints of the warm-up; or a registered name; null for the
            scoring checkpoint alone.
        epochs: Passes over what the path trains on; null for 16 along the target, and for those of the warm-up.
        learning_rate: The path's, constant; null for the warm-up's.
        optimizer: The path's, without weight decay: adamw, or sgd without momentum.
        pieces: Into how many pieces of equally many steps the path is cut, or the steps at which its pieces end.
        quadrature: Where each piece is scored: at its start (left), its middle, or both ends (trapezoid).
        held_out: Share of the validation set that the path is not trained on; it ends where the loss of this share is
            lowest. 0 takes the whole path.
        tolerance: How far the scores may be from the fall of the losses, as a share of it; until then pieces are cut.
        most_pieces: Most pieces to cut the path into.
        columns: Whose loss the weights are scored by: that of the validation set (target), of the pool, or by the
            product of both scores.
        normalize: What the examples' scores are: the fall of the mean loss of a token (none), the fall summed over the
            tokens (length), its share of the example's loss at the start (initial_loss), or of that and the pool's mean
            (smoothed_loss); null for smoothed_loss where the scores are falls of the loss, and for none elsewhere.
    """

    along: ScoringPath | None = None
    epochs: int | None = None
    learning_rate: float | None = None
    optimizer: OptimizerName = "adamw"
    pieces: int | list[int] = 8
    quadrature: Rule = "trapezoid"
    held_out: float = 0.25
    tolerance: float = 0.05
    most_pieces: int = 64
    columns: Columns = "target"
    normalize: Normalization | None = None

    def __post_init__(self) -> None:
        if self.epochs is not None and self.epochs < 1:
            raise UserError(f"model.path.epochs is {self.epochs}; give at least 1.")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise UserError(f"model.path.learning_rate is {self.learning_rate}; give a positive number.")
        ends = [self.pieces] if isinstance(self.pieces, int) else self.pieces
        if not ends or ends[0] < 1 or sorted(set(ends)) != ends:
            raise UserError(
                f"model.path.pieces is {self.pieces}; give a number of pieces of at least 1, or the steps at which "
                "they end, in ascending order."
            )
        if self.most_pieces < 1:
            raise UserError(f"model.path.most_pieces is {self.most_pieces}; give at least 1.")
        if not 0 <= self.held_out < 1:
            raise UserError(f"model.path.held_out is {self.held_out}; give a share from 0 (none) to below 1.")
        if not 0 < self.tolerance < math.inf:
            raise UserError(f"model.path.tolerance is {self.tolerance}; give a positive number.")
        for name, kind in (("quadrature", Rule), ("columns", Columns), ("optimizer", OptimizerName)):
            if getattr(self, name) not in get_args(kind):
                raise UserError(
                    f"model.path.{name} is {getattr(self, name)!r}; give one of {', '.join(get_args(kind))}."
                )
        if self.normalize not in (None, *get_args(Normalization)):
            raise UserError(
                f"model.path.normalize is {self.normalize!r}; give one of {', '.join(get_args(Normalization))}, or "
                "null."
            )

    @property
    def normalization(self) -> Normalization:
        """The normalisation in use."""
        if self.normalize is not None or self.along is None:
            return self.normalize or "none"
        return "smoothed_loss" if self.along.is_complete and self.along.adds_rows else "none"

    def ends(self, steps: int) -> list[int]:
        """The steps at which the pieces end, of a training of so many steps.

        Raises:
            UserError: if there are not so many steps.
        """
        if isinstance(self.pieces, int):
            pieces = min(self.pieces, steps)
            return [round(k * steps / pieces) for k in range(1, pieces + 1)]
        if self.pieces[-1] > steps:
            raise UserError(
                f"model.path.pieces ends at step {self.pieces[-1]}, but the path has {steps}; lower it, or raise "
                "model.path.epochs."
            )
        return self.pieces
