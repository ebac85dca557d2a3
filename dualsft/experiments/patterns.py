"""Where the weights that methods choose are: by layer and kind of module, the share of the weights that is chosen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from dualsft.allocators.groups import KINDS
from dualsft.experiments.grid import Budgets
from dualsft.experiments.methods import share
from dualsft.runs.table import markdown_table
from dualsft.selection.diagnostics import ALL, by_place
from dualsft.selection.diagnostics.parameters import parameter_figures


@dataclass(frozen=True)
class Chosen:
    """What a method chose under its budgets, with one seed.

    Attributes:
        method: The method's name.
        budgets: How much of each side it chose; null for all.
        seed: The selection's seed.
        examples: Their row numbers in the pool.
        pool: How many examples it chose from.
        mask: Parameter name -> bool, which weights; each tensor may be made when it is read.
    """

    method: str
    budgets: Budgets
    seed: int
    examples: frozenset[int]
    pool: int
    mask: Mapping[str, Tensor]

    def described(self) -> dict[str, Any]:
        """The columns that say which choice it is; see `dualsft.experiments.results.parquet_table`."""
        budgets = {f"budget_{side}": None if b is None else float(b) for side, b in vars(self.budgets).items()}
        return {"method": self.method, **budgets, "seed": self.seed}


def density_rows(chosen: Sequence[Chosen]) -> list[dict[str, Any]]:
    """One row for each choice, layer and kind of module; layer is null for weights outside of all layers."""
    return [
        {
            **one.described(),
            **{"layer": of.layer, "kind": of.kind, "weights": of.size, "chosen": of.selected, "density": of.density},
        }
        for one in chosen
        if one.budgets.parameters is not None
        for of in by_place(parameter_figures(one.mask, {})[0])
    ]


@dataclass(frozen=True)
class Densities:
    """The mean densities of a method over its seeds.

    Attributes:
        title: The method and its budgets.
        layers: Names of the layers, in order.
        kinds: The kinds of modules, all of them together last.
        values: Shares, layer by layer; NaN where a layer has no module of the kind.
    """

    title: str
    layers: list[str]
    kinds: list[str]
    values: np.ndarray

    def markdown(self) -> str:
        """The table in Markdown, in percent."""
        cells = [["-" if np.isnan(v) else f"{100 * v:.1f}" for v in row] for row in self.values]
        head = ["layer", *self.kinds]
        return markdown_table([head, *([name, *row] for name, row in zip(self.layers, cells, strict=True))])


def densities(rows: Sequence[Mapping[str, Any]]) -> list[Densities]:
    """The rows of `density_rows` as one table for each method under its budgets."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["budget_data"], row["budget_parameters"]), []).append(row)
    names = [method for method, *_ in groups]
    return [
        _table(f"{method} ({as_given(parameters)})" if names.count(method) > 1 else method, own)
        for (method, _, parameters), own in groups.items()
    ]


def as_given(budget: float | None) -> str:
    """A budget of `Chosen.described` in words: a fraction, or a count."""
    return share(budget if budget is None or budget <= 1 else int(budget))


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> Densities:
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    kinds = [kind for kind in (*KINDS, ALL) if any(row["kind"] == kind for row in rows)]
    values = np.full((len(layers), len(kinds)), np.nan)
    for i, layer in enumerate(layers):
        for j, kind in enumerate(kinds):
            if found := [row["density"] for row in rows if (row["layer"], row["kind"]) == (layer, kind)]:
                values[i, j] = np.mean(found)
    return Densities(title, ["outside" if layer is None else str(layer) for layer in layers], kinds, values)
