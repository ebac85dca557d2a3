"""The result of a pass over some examples, and its form on disk: named tensors and a few notes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dualsft.matrix.example_values import ExampleValues
from dualsft.models.lazy import under
from dualsft.sharding.collectives import all_gather

Statistic = ExampleValues | dict[int, Tensor]
"""What was measured of each example, by its id: a number (float64), or a vector (float32)."""


@dataclass
class GradientPass:
    """Sums, rows and measurements of one pass over some examples.

    Attributes:
        sums: Parameter name -> Σ_i g_i over the counted examples; empty when no columns were asked for. Of a pass on
            disk each is read at every use.
        rows: For each direction, example id -> <u, g_i>.
        tokens: For each direction, example id -> the contributions of its tokens to <u, g_i>, float64; empty unless
            asked for.
        measured: Name of a statistic -> example id -> a number or a vector; empty unless asked for.
        counted: How many examples the sums hold.
        nonfinite: Ids of the examples whose loss or gradient is not finite; they are in neither sums nor rows.
        covered: Names of the parameters that the rows cover.
    """

    sums: Mapping[str, Tensor]
    rows: list[ExampleValues] = field(default_factory=list)
    tokens: list[dict[int, Tensor]] = field(default_factory=list)
    measured: dict[str, Statistic] = field(default_factory=dict)
    counted: int = 0
    nonfinite: set[int] = field(default_factory=set)
    covered: set[str] = field(default_factory=set)

    def measure(self, name: str, ids: Sequence[int], values: Tensor) -> None:
        """Add a statistic of more examples: the tensor, on the host, has their numbers or vectors."""
        known = self.measured.setdefault(name, ExampleValues() if values.dim() == 1 else {})
        if isinstance(known, ExampleValues):
            known.add(ids, values.numpy())
        else:
            known.update(zip(ids, values, strict=True))

    def share(self) -> None:
        """Gather the results of all ranks, except for the sums, which stay shards."""
        ranks = all_gather(replace(self, sums={}))
        self.counted = sum(of.counted for of in ranks)
        self.nonfinite = {i for of in ranks for i in of.nonfinite}
        self.covered = {name for of in ranks for name in of.covered}
        self.rows = [ExampleValues.joined([of.rows[k] for of in ranks]) for k in range(len(self.rows))]
        self.tokens = [{i: v for of in ranks for i, v in of.tokens[k].items()} for k in range(len(self.tokens))]
        names = sorted({name for of in ranks for name in of.measured})
        self.measured = {n: _joined([of.measured[n] for of in ranks if n in of.measured]) for n in names}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and notes to keep, from which `from_state` makes the same again."""
        tensors = {f"sum:{name}": total for name, total in self.sums.items()}
        for k, rows in enumerate(self.rows):
            tensors[f"id:{k}"], tensors[f"row:{k}"] = _tensors(rows)
        for k, tokens in enumerate(self.tokens):
            tensors[f"tokens:{k}"] = torch.cat([torch.empty(0, dtype=torch.float64), *tokens.values()])
            tensors[f"lengths:{k}"] = torch.tensor([len(values) for values in tokens.values()], dtype=torch.int64)
        for name, of in self.measured.items():
            tensors[f"measured id:{name}"], tensors[f"measured:{name}"] = _tensors(of)
        notes = {"counted": self.counted, "nonfinite": sorted(self.nonfinite), "covered": sorted(self.covered)}
        return tensors, notes

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> "GradientPass":
        """The result that `state` was made of."""
        count = sum(name.startswith("id:") for name in tensors)
        rows = [_values(tensors[f"id:{k}"], tensors[f"row:{k}"]) for k in range(count)]
        return cls(
            sums=under("sum", tensors),
            rows=rows,
            tokens=[
                dict(zip(of, tensors[f"tokens:{k}"].split(tensors[f"lengths:{k}"].tolist()), strict=True))
                for k, of in enumerate(rows)
                if "tokens:0" in tensors
            ],
            measured={
                name: _statistic(tensors[f"measured id:{name}"], values)
                for name, values in under("measured", tensors).items()
            },
            counted=notes["counted"],
            nonfinite=set(notes["nonfinite"]),
            covered=set(notes["covered"]),
        )


def _joined(parts: Sequence[Statistic]) -> Statistic:
    """A statistic of the examples of all ranks."""
    if vectors := [part for part in parts if not isinstance(part, ExampleValues)]:
        return {i: vector for part in vectors for i, vector in part.items()}
    return ExampleValues.joined([part for part in parts if isinstance(part, ExampleValues)])


def _tensors(of: Statistic) -> tuple[Tensor, Tensor]:
    """Ids, and the numbers or vectors."""
    if isinstance(of, ExampleValues):
        return torch.tensor(of.ids), torch.tensor(of.numbers)
    return torch.tensor(list(of)), torch.stack(list(of.values()))


def _statistic(ids: Tensor, values: Tensor) -> Statistic:
    return _values(ids, values) if values.dim() == 1 else dict(zip(ids.tolist(), values, strict=True))


def _values(ids: Tensor, values: Tensor) -> ExampleValues:
    """A copy: the tensors of a state may be a file in memory, which would stay on the disk."""
    return ExampleValues(ids.numpy().copy(), values.numpy().copy())
