"""``diagnostics.json`` as dataclasses, from which it is written and by which it is read."""

import json
import math
from bisect import bisect_right
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from dualsft.selection.diagnostics.levels import LEVELS, Quantiles, budget_counts
from dualsft.selection.json_values import typed


@dataclass(frozen=True, kw_only=True)
class ScoreFigures:
    """The scores of one side, and what was chosen of it.

    Attributes:
        scored: How many examples or weights have scores.
        selected: How many are chosen.
        selected_positive: How many of the chosen have a score above zero.
        score_sum: The sum of the scores.
        positive_share: The share of the scores that is above zero.
        positive_sum: The sum of these.
        captured: The share of that sum that the chosen hold; null if no score is positive.
        quantiles: Of the scores.
        capture: For budgets of 1% to 100%, the share of the positive sum that the highest scores hold; empty if no
            score is positive.
        capture_by_magnitude: The same share of Σ |φ| that the largest |φ| hold, by which weights are chosen unless one
            asks for another way; empty for examples.
    """

    scored: int
    selected: int
    selected_positive: int
    score_sum: float
    positive_share: float
    positive_sum: float
    captured: float | None
    quantiles: Quantiles
    capture: list[float]
    capture_by_magnitude: list[float] = field(default_factory=list)

    def best(self, count: int) -> "Captured | None":
        """What the highest scores hold, for the largest whole percent that is no more than a count; None if none is."""
        counts = budget_counts(self.scored)
        percents = bisect_right(counts, count)
        return Captured(counts[percents - 1], self.capture[percents - 1]) if percents and self.capture else None


class Captured(NamedTuple):
    """How many of the highest scores there are, and their share of the positive sum."""

    number: int
    captured: float


@dataclass(frozen=True)
class SourceGroup:
    """The rows of one source: how many there are, were scored and chosen, with their supervised tokens.

    The name is null for all that are too rare to be listed.
    """

    name: str | None
    rows: int
    scored: int
    selected: int
    tokens: int
    selected_tokens: int
    score_sum: float


@dataclass(frozen=True)
class Sources:
    """The rows by source, the most frequent first; the column that names it is null where files are the sources."""

    column: str | None
    groups: list[SourceGroup]


@dataclass(frozen=True)
class LengthBin:
    """The rows with this many supervised tokens, both bounds included: how many there are, were scored and chosen."""

    shortest: int
    longest: int
    rows: int
    scored: int
    selected: int


@dataclass(frozen=True)
class Lengths:
    """The lengths of the rows in supervised tokens.

    Attributes:
        bins: Lengths from one power of two to the next.
        pool: Quantiles of the lengths of all scored rows.
        selected: Quantiles of the lengths of the chosen rows.
        pool_tokens: The tokens of all scored rows.
        selected_tokens: The tokens of the chosen rows.
        correlation: Spearman's rank correlation of length and score; null where either is the same in all rows.
    """

    bins: list[LengthBin]
    pool: Quantiles
    selected: Quantiles
    pool_tokens: int
    selected_tokens: int
    correlation: float | None


@dataclass(frozen=True)
class Target:
    """The validation sets together.

    Attributes:
        rows: How many of their rows have supervised tokens.
        tokens: Quantiles of the lengths in supervised tokens.
        sources: Source -> how many rows, by the column that names the pool's sources; null without it.
    """

    rows: int
    tokens: Quantiles
    sources: dict[str, int] | None = None


@dataclass(frozen=True)
class Alignment:
    """Cosines of directions in weight space for one validation set; null where no pass gave both.

    Attributes:
        validation_prior: Of the gradient of the validation loss and the prior's, at the scoring checkpoint.
        direction_pool: Of u and ḡ.
    """

    validation_prior: float | None = None
    direction_pool: float | None = None


@dataclass(frozen=True)
class Stability:
    """Spearman's rank correlation of the scores that two halves of the validation set give.

    Attributes:
        examples: Of the examples' scores.
        parameters: Of the weights' scores.
    """

    examples: float | None = None
    parameters: float | None = None


@dataclass(frozen=True)
class Basis:
    """What the scores rest on; another choice from the same scores keeps it.

    Attributes:
        target: The validation sets.
        alignment: Validation set -> cosines.
        warmup_steps: Optimizer steps of the warm-up; null without one.
        stability: How far the order of the scores rests on the choice of validation rows; null if not asked for.
    """

    target: Target | None = None
    alignment: dict[str, Alignment] = field(default_factory=dict)
    warmup_steps: int | None = None
    stability: Stability | None = None


@dataclass(frozen=True)
class Diagnostics:
    """What a choice looks like.

    Attributes:
        examples: The examples' scores.
        parameters: The weights' scores; null where none was scored.
        lengths: The rows by length.
        sources: The rows by source; null where all are of one file and have no such column.
        basis: What the scores rest on.
    """

    examples: ScoreFigures
    parameters: ScoreFigures | None
    lengths: Lengths
    sources: Sources | None
    basis: Basis

    def as_json(self) -> str:
        """The text of ``diagnostics.json``."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> "Diagnostics":
        """The inverse of `as_json`.

        Raises:
            ValueError: if it is no JSON of finite numbers and text, or levels of quantiles or budgets are missing.
            Mismatch: if a key is missing or of another type.
        """
        stored = json.loads(text, parse_float=_finite, parse_constant=_finite)
        found: Any = typed(Diagnostics, stored, "")
        json.dumps(stored, ensure_ascii=False).encode()  # a lone surrogate, as an escape, could not be written again
        assert isinstance(found, Diagnostics)
        _check_levels(found)
        return found


def _check_levels(found: Diagnostics) -> None:
    sides = [side for side in (found.examples, found.parameters) if side is not None]
    target = [found.basis.target.tokens] if found.basis.target else []
    levels = [*(side.quantiles for side in sides), found.lengths.pool, found.lengths.selected, *target]
    curves = [curve for side in sides for curve in (side.capture, side.capture_by_magnitude)]
    if any(of and list(of) != list(map(str, LEVELS)) for of in levels) or {*map(len, curves)} - {0, 100}:
        raise ValueError("levels are missing")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not finite")
    return number
