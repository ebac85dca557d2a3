"""What a run tells of its scores beside the scores themselves, once nothing is computed any more."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from dualsft.matrix.pass_result import Statistic
from dualsft.matrix.sketches import SKETCH
from dualsft.selection.diagnostics import Alignment, Stability
from dualsft.selection.order import ScoresBothSides


@dataclass(frozen=True)
class Outcome:
    """The findings of the passes that gave the scores.

    Attributes:
        measured: Name of a statistic -> example id -> its value.
        nonfinite: Ids of the pool examples whose loss or gradient is not finite.
        identity: Name of a validation set -> both sides of the sum identity.
        prediction: What the scores predict of a step, if anything.
        alignment: Validation set -> cosines of its directions, where a pass at one checkpoint gave them.
        stability: How far two halves of the validation set agree on the scores, if they were asked.
        path: The path along which everything was scored, if there is one.
    """

    measured: dict[str, Statistic]
    nonfinite: set[int]
    identity: dict[str, dict[str, float]]
    prediction: dict[str, Any] | None
    alignment: dict[str, Alignment]
    stability: Stability | None
    path: dict[str, Any] | None

    @classmethod
    def of(cls, scoring: ScoresBothSides) -> "Outcome":
        """The findings of a scoring so far; every rank calls this, as some are sums over ranks."""
        return cls(
            measured=scoring.measured,
            nonfinite=scoring.nonfinite,
            identity=scoring.identity,
            prediction=scoring.prediction(),
            alignment=scoring.alignment(),
            stability=scoring.stability(),
            path=scoring.describe(),
        )

    @property
    def sketches(self) -> dict[int, Tensor] | None:
        """Example id -> its gradient's sketch, if they were measured."""
        found = self.measured.get(SKETCH)
        return found if isinstance(found, dict) else None

    def notes(self) -> dict[str, Any]:
        """All but the measurements, as JSON can hold it; `from_notes` reads it."""
        told = {**vars(self), "nonfinite": sorted(self.nonfinite)}
        told["alignment"] = {name: asdict(of) for name, of in self.alignment.items()}
        told["stability"] = self.stability and asdict(self.stability)
        return {name: value for name, value in told.items() if name != "measured"}

    @classmethod
    def from_notes(cls, notes: Mapping[str, Any], measured: dict[str, Statistic]) -> "Outcome":
        """The findings that `notes` were made of, with the measurements."""
        return cls(
            measured=measured,
            nonfinite=set(notes["nonfinite"]),
            identity=notes["identity"],
            prediction=notes["prediction"],
            alignment={name: Alignment(**of) for name, of in notes["alignment"].items()},
            stability=notes["stability"] and Stability(**notes["stability"]),
            path=notes["path"],
        )
