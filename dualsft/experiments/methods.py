"""What each method of a grid does under each budget and seed: the selections that it needs, and what is trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dualsft.allocators import Budget
from dualsft.errors import naming
from dualsft.experiments.grid import Budgets, Grid, Method, Side
from dualsft.experiments.variants import Draw, Variant

_DATA, _PARAMETERS, _SEED = "model.data_budget", "model.parameter_budget", "seed_everything"


@dataclass(frozen=True)
class Choice:
    """A selection that is to be made.

    Attributes:
        settings: Settings of select by dotted key.
        of: The selection whose chosen examples are the pool of this one; None for the configuration's pool.
    """

    settings: Mapping[str, Any]
    of: "Choice | None" = None


@dataclass(frozen=True)
class Recipe:
    """One run of a comparison, before it is known which jobs it takes.

    Attributes:
        method: The method's name.
        budgets: How much of each side is trained; null for all.
        seed: Of selection and fit.
        choice: The selection that says what is trained; None if everything is.
        variant: What is taken in place of what it chose; None for just that.
        fit: Settings of fit by dotted key.
        adapter: The configuration of an adapter to train in place of weights.
    """

    method: str
    budgets: Budgets
    seed: int
    choice: Choice | None
    variant: Variant | None
    fit: Mapping[str, Any]
    adapter: Mapping[str, Any] | None

    @property
    def place(self) -> str:
        """Where in the grid it comes from, for errors."""
        return f"methods.{self.method}"

    @property
    def label(self) -> str:
        """What people call it."""
        return label(self.method, self.budgets, self.seed)

    @property
    def uses_scores(self) -> bool:
        """Whether what is trained depends on scores, whose cost is then a part of the run's."""
        if self.choice is None:
            return False
        budgets = {"examples": self.budgets.data, "weights": None if self.adapter else self.budgets.parameters}
        drawn = [] if self.variant is None else [s for s in budgets if self.variant[s]["rule"] == "random"]  # type: ignore[literal-required]
        return any(budget is not None and side not in drawn for side, budget in budgets.items())


def label(method: str, budgets: Budgets, seed: int | None) -> str:
    """A run in words."""
    return f"{method} ({share(budgets.data)} of data, {share(budgets.parameters)} of weights), seed {seed}"


def share(budget: Budget) -> str:
    """A budget in words."""
    if budget is None:
        return "all"
    return f"{budget:,}" if isinstance(budget, int) else f"{100 * budget:g}%"


def recipes(grid: Grid, order: str = "both") -> list[Recipe]:
    """The runs of a grid, by method, budgets and seed; what no budget of the grid changes is there once.

    Args:
        grid: The grid.
        order: The ``model.order`` of methods that set none.
    """
    found: dict[tuple[object, ...], Recipe] = {}
    for name, method in grid.methods.items():
        for budgets in grid.budgets:
            for seed in grid.seeds:
                with naming(f"methods.{name}"):
                    recipe = _recipe(name, method, _budgets_of(method, budgets, order), seed)
                found.setdefault((name, recipe.budgets, seed), recipe)
    return list(found.values())


def _recipe(name: str, method: Method, budgets: Budgets, seed: int) -> Recipe:
    everything = method.examples == "all" and (method.weights == "all" or method.adapter is not None)
    return Recipe(
        method=name,
        budgets=budgets,
        seed=seed,
        choice=None if everything else _choice(method, budgets, seed),
        variant=_variant(method, seed),
        fit={**method.fit, _SEED: seed},
        adapter=method.adapter,
    )


def _budgets_of(method: Method, budgets: Budgets, order: str) -> Budgets:
    """The grid's budgets where the method does not fix its own."""
    data, parameters = ({**method.select, **(own or {})} for own in (method.data, method.parameters))
    order = "both" if method.is_sequential else method.select.get("model.order", order)
    return Budgets(
        None if method.examples == "all" or order == "parameters" else data.get(_DATA, budgets.data),
        None if method.weights == "all" or order == "data" else parameters.get(_PARAMETERS, budgets.parameters),
    )


def _choice(method: Method, budgets: Budgets, seed: int) -> Choice:
    common = {**method.select, _SEED: seed}
    if not method.is_sequential:
        weights = None if method.adapter is not None else budgets.parameters
        return Choice({**common, _DATA: budgets.data, _PARAMETERS: weights})
    # with weights chosen too, so that it can share its scores with selections of both sides
    first = Choice({**common, **(method.data or {}), _DATA: budgets.data, _PARAMETERS: budgets.parameters})
    return Choice({**common, **(method.parameters or {}), _DATA: None, _PARAMETERS: budgets.parameters}, first)


def _variant(method: Method, seed: int) -> Variant | None:
    """What is drawn anew; a side of which all is taken has been chosen under no budget."""
    if {method.examples, method.weights} <= {"chosen", "all"}:
        return None
    return {"examples": _draw(method.examples, seed), "weights": _draw(method.weights, seed)}


def _draw(side: Side, seed: int) -> Draw:
    match side:
        case "random":
            return {"rule": "random", "seed": seed}
        case "lowest":
            return {"rule": "band", "band": 1, "bands": 2}
    return {"rule": "chosen"}
