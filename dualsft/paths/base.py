"""The interface of paths: where a path goes, and the direction in which each piece of it scores.

    M_ij = Σ_k g_ij(θ_k') (u_k)_j        u_k = θ_k − θ_{k+1}, or as a path defines it

With u_k = θ_k − θ_{k+1} the path is *complete*: the fundamental theorem of calculus gives

    Σ_j M_ij = l_i(θ_0) − l_i(θ_K)       exactly, as the pieces get short

One piece with θ_1 = θ_0 − u is the score at a single checkpoint, to first order. The integral is this package's
addition to arXiv 2605.06166.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn

from dualsft.needs import Given, by_own_name
from dualsft.scorers import ParameterStatistics

PathStatistic = Literal["scorer_direction", "statistics"]
"""What a path's direction may need of the end of a piece; either takes passes over the validation sets there."""

PieceStatistic = Literal["gradient_norm", "preconditioned_gradient_norm"]
"""What a path's contribution may need of single examples; either takes a backward pass for each example."""


@runtime_checkable
class PathTraining(Protocol):
    """The training that a path advances: on the validation set, or on the warm-up's share of the pool.

    Attributes:
        model: The model; of a sharded one every rank holds its shards.
        epochs: Passes over what it trains on.
        steps: The optimizer steps of all epochs, the same number in each.
        stretches: The steps of each piece, as the options place them.
    """

    model: nn.Module
    epochs: int
    steps: int
    stretches: Sequence[int]

    def train(self, steps: int) -> None:
        """Take so many optimizer steps."""

    def load(self, checkpoint: str) -> None:
        """Copy the weights of a checkpoint into the model: a Hugging Face folder or hub id, of the same architecture.

        A path that loads before its first step trains from there.
        """


@dataclass(frozen=True)
class Piece(Given):
    """A piece of the path, seen from one parameter.

    All tensors have the parameter's shape, and are float32 (float64 for float64 weights).

    Attributes:
        name: The parameter's name.
        number: Which piece it is, from 0.
        start: θ_k.
        end: θ_{k+1}.
        learning_rate: The training's.
        scorer_direction: The direction of the run's scorer at θ_{k+1}, if the path needs it.
        statistics: What a scorer would get at θ_{k+1}: v, P and others, if the path needs them.
    """

    asked_for: ClassVar = by_own_name("scorer_direction", "statistics")

    name: str
    number: int
    start: Float[Tensor, "*shape"]
    end: Float[Tensor, "*shape"]
    learning_rate: float
    scorer_direction: Float[Tensor, "*shape"] | None = None
    statistics: ParameterStatistics | None = None


@dataclass(frozen=True)
class PieceRows(Given):
    """What one piece gives to the examples.

    Attributes:
        example_id: Row numbers in the pool, ascending.
        score: <u_k, g_i>, aligned with ``example_id``.
        num_tokens: Supervised tokens of each.
        validation_norm: ‖v‖ at the end of the piece, if the path needs the statistics there.
        gradient_norm: ‖g_i‖, if the path needs it.
        preconditioned_gradient_norm: ‖P ⊙ g_i‖, if the path needs it.
    """

    asked_for: ClassVar = {
        "validation_norm": ("needs", "statistics"),
        **by_own_name("gradient_norm", "preconditioned_gradient_norm", where="needs_of_examples"),
    }

    example_id: Int[Tensor, " example"]
    score: Float[Tensor, " example"]
    num_tokens: Int[Tensor, " example"]
    validation_norm: float | None = None
    gradient_norm: Float[Tensor, " example"] | None = None
    preconditioned_gradient_norm: Float[Tensor, " example"] | None = None


class ScoringPath:
    """A rule for the points θ_k, and for the direction u_k of each piece.

    A subclass that overrides nothing else is the path of a training with u_k = θ_k − θ_{k+1}.

    Attributes:
        trains_on: ``target`` for a path of its own along each validation set, from the scoring checkpoint on, ``pool``
            for one along the warm-up, from the base model on.
        needs: What `direction` uses besides the weights.
        needs_of_examples: What `contribution` uses besides the rows.
    """

    trains_on: ClassVar[Literal["target", "pool"]] = "target"
    needs: tuple[PathStatistic, ...] = ()
    needs_of_examples: tuple[PieceStatistic, ...] = ()

    def walk(self, training: PathTraining) -> Iterator[None]:
        """Move the model's weights along the path, and yield at each point θ_0 to θ_K; by default by training.

        The weights may be moved otherwise too, but not between steps of the training. After a kill the walk starts
        again; steps of the training that were taken before are then not taken again.
        """
        yield
        for steps in training.stretches:
            training.train(steps)
            yield

    def direction(self, piece: Piece) -> Float[Tensor, "*shape"]:
        """u_k for one parameter, of its shape: θ_k − θ_{k+1} unless a subclass defines another.

        Another direction is scored at the end of its piece alone; θ_k − θ_{k+1} is integrated along the piece.
        """
        return piece.start - piece.end

    def contribution(self, rows: PieceRows) -> Float[Tensor, " example"]:
        """What the piece adds to the examples' scores, aligned with ``rows.example_id``: by default its rows."""
        return rows.score

    @property
    def is_complete(self) -> bool:
        """Whether u_k = θ_k − θ_{k+1}, so that the rows add up to the fall of each example's loss."""
        return type(self).direction is ScoringPath.direction

    @property
    def adds_rows(self) -> bool:
        """Whether the scores are the sums of the rows."""
        return type(self).contribution is ScoringPath.contribution
