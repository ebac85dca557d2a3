"""The result of a pass over some examples, and its form on disk: named tensors and a few notes."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dualsft.models.lazy import under
from dualsft.sharding.collectives import all_gather


@dataclass
class GradientPass:
    """Sums, rows and measurements of one pass over some examples.

    Attributes:
        sums: Parameter name -> Σ_i g_i over the counted examples; empty when no columns were asked for. Of a pass on
            disk each is read at every use.
        rows: For each direction, example id -> <u, g_i>.
        tokens: For each direction, example id -> the contributions of its tokens to <u, g_i>, float64; empty unless
            asked for.
        measured: Name of a statistic -> example id -> a number (float64) or a vector (float32); empty unless asked
            for.
        counted: How many examples the sums hold.
        nonfinite: Ids of the examples whose loss or gradient is not finite; they are in neither sums nor rows.
        covered: Names of the parameters that the rows cover.
    """

    sums: Mapping[str, Tensor]
    rows: list[dict[int, float]] = field(default_factory=list)
    tokens: list[dict[int, Tensor]] = field(default_factory=list)
    measured: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    counted: int = 0
    nonfinite: set[int] = field(default_factory=set)
    covered: set[str] = field(default_factory=set)

    def share(self) -> None:
        """Gather the results of all ranks, except for the sums, which stay shards."""
        ranks = all_gather(replace(self, sums={}))
        self.counted = sum(of.counted for of in ranks)
        self.nonfinite = {i for of in ranks for i in of.nonfinite}
        self.covered = {name for of in ranks for name in of.covered}
        self.rows = [{i: v for of in ranks for i, v in of.rows[k].items()} for k in range(len(self.rows))]
        self.tokens = [{i: v for of in ranks for i, v in of.tokens[k].items()} for k in range(len(self.tokens))]
        names = sorted({name for of in ranks for name in of.measured})
        self.measured = {n: {i: v for of in ranks for i, v in of.measured.get(n, {}).items()} for n in names}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and notes to keep, from which `from_state` makes the same again."""
        tensors = {f"sum:{name}": total for name, total in self.sums.items()}
        for k, rows in enumerate(self.rows):
            tensors[f"id:{k}"] = torch.tensor(list(rows), dtype=torch.int64)
            tensors[f"row:{k}"] = torch.tensor(list(rows.values()), dtype=torch.float64)
        for k, tokens in enumerate(self.tokens):
            tensors[f"tokens:{k}"] = torch.cat([torch.empty(0, dtype=torch.float64), *tokens.values()])
            tensors[f"lengths:{k}"] = torch.tensor([len(values) for values in tokens.values()], dtype=torch.int64)
        for name, values in self.measured.items():
            tensors[f"measured id:{name}"] = torch.tensor(list(values), dtype=torch.int64)
            tensors[f"measured:{name}"] = torch.stack([*values.values()]) if values else torch.empty(0)
        notes = {"counted": self.counted, "nonfinite": sorted(self.nonfinite), "covered": sorted(self.covered)}
        return tensors, notes

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> "GradientPass":
        """The result that `state` was made of."""
        ids = [tensors[f"id:{k}"].tolist() for k in range(sum(name.startswith("id:") for name in tensors))]
        return cls(
            sums=under("sum", tensors),
            rows=[dict(zip(of, tensors[f"row:{k}"].tolist(), strict=True)) for k, of in enumerate(ids)],
            tokens=[
                dict(zip(of, tensors[f"tokens:{k}"].split(tensors[f"lengths:{k}"].tolist()), strict=True))
                for k, of in enumerate(ids)
                if "tokens:0" in tensors
            ],
            measured={
                name: dict(zip(tensors[f"measured id:{name}"].tolist(), values, strict=True))
                for name, values in under("measured", tensors).items()
            },
            counted=notes["counted"],
            nonfinite=set(notes["nonfinite"]),
            covered=set(notes["covered"]),
        )
