"""The sums over the points of a path, kept after each point, so that no point's own sums stay on disk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dualsft.matrix.example_values import ExampleValues
from dualsft.matrix.pass_result import GradientPass, Statistic
from dualsft.models.dtypes import accumulator_dtype
from dualsft.models.lazy import under
from dualsft.runs.folder import RunFolder
from dualsft.runs.progress import PhaseLog


@dataclass
class PathTotals:
    """What the points of a path have given so far, for one direction at each point or several.

    Attributes:
        rows: For each direction, example id -> Σ_k <u_k, g_i>.
        tokens: For each direction, example id -> the contributions of its tokens, if they are kept.
        columns: For each direction, parameter name -> Σ_k (u_k)_j Σ_i g_ij, on the host; empty without columns.
        level: How often the path has been refined.
        points: How many points of this level have been added.
        costs: The phases of the points.
        measured: Name of a statistic -> example id -> its value at the latest point, if any was measured.
        about: Notes of whoever adds the points.
    """

    rows: list[ExampleValues] = field(default_factory=list)
    tokens: list[dict[int, Tensor]] = field(default_factory=list)
    columns: list[dict[str, Tensor]] = field(default_factory=list)
    level: int = 0
    points: int = 0
    costs: list[dict[str, Any]] = field(default_factory=list)
    measured: dict[str, Statistic] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def scale(self, factor: float) -> None:
        """Multiply everything by a factor."""
        self.rows = [ExampleValues(of.ids, factor * of.numbers) for of in self.rows]
        self.tokens = [{i: factor * values for i, values in of.items()} for of in self.tokens]
        for of in self.columns:
            for total in of.values():
                total.mul_(factor)

    def add(self, found: GradientPass, us: Sequence[Mapping[str, Tensor]], *costs: dict[str, Any]) -> None:
        """Add a point's rows, tokens, columns u_j Σ_i g_ij, and costs."""
        columns = [{name: column(u[name], found.sums[name]) for name in u} for u in us] if found.sums else []
        self.add_sums(found.rows, found.tokens, columns, *costs)

    def add_sums(
        self,
        rows: Sequence[ExampleValues],
        tokens: Sequence[Mapping[int, Tensor]],
        columns: Sequence[Mapping[str, Tensor]],
        *costs: dict[str, Any],
    ) -> None:
        """Add a point's sums, of the examples that all points have, and its costs."""
        self.rows, self.tokens = _row_sums(self.rows, rows), _sums(self.tokens, tokens)
        self.columns = _sums(self.columns, columns)
        self.points += 1
        self.costs += costs

    def save(self, run: RunFolder, key: str) -> None:
        """Keep the sums under a name."""
        columns = {f"column:{k}:{name}": total for k, of in enumerate(self.columns) for name, total in of.items()}
        parts, _ = GradientPass({}, self.rows, self.tokens, self.measured).state()
        notes = {"level": self.level, "points": self.points, "costs": self.costs, "about": self.about}
        run.save(key, {**columns, **parts}, notes)

    @classmethod
    def load(cls, run: RunFolder, key: str, log: PhaseLog) -> "PathTotals | None":
        """The sums that an earlier run kept under a name; what they cost goes to the log."""
        if (saved := run.load(key)) is None:
            return None
        tensors, notes = saved
        for cost in notes["costs"]:
            log.restore(cost)
        empty = {"counted": 0, "nonfinite": [], "covered": []}
        kept = GradientPass.from_state(tensors, empty)
        columns: dict[int, dict[str, Tensor]] = {}
        for name, tensor in under("column", tensors).items():
            number, parameter = name.split(":", 1)
            columns.setdefault(int(number), {})[parameter] = tensor
        in_order = [columns[k] for k in sorted(columns)]
        done = (notes["level"], notes["points"], notes["costs"])
        return cls(kept.rows, kept.tokens, in_order, *done, kept.measured, notes["about"])


def column(u: Tensor, gradients: Tensor) -> Tensor:
    """φ_j = u_j Σ_i g_ij of one parameter, on the host."""
    wide = accumulator_dtype(u)
    return (gradients.to(u.device, wide) * u.to(wide)).cpu()


def _row_sums(before: Sequence[ExampleValues], more: Sequence[ExampleValues]) -> list[ExampleValues]:
    """The sums of examples' values, of the examples that both have, for each direction."""
    if not before or not more:
        return [*(before or more)]
    common = [b.where(a.has(b.ids)) for b, a in zip(before, more, strict=True)]
    return [ExampleValues(b.ids, b.numbers + a.at(b.ids)) for b, a in zip(common, more, strict=True)]


def _sums(before: Sequence[Mapping[Any, Any]], more: Sequence[Mapping[Any, Any]]) -> list[dict[Any, Any]]:
    """The sums of values by key, of the keys that both have, for each direction."""
    if not before or not more:
        return [dict(of) for of in before or more]
    return [{key: value + a[key] for key, value in b.items() if key in a} for b, a in zip(before, more, strict=True)]
