"""The grid of a comparison: methods x budgets x seeds, and what each trained model is measured on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dualsft.allocators import Budget, check_budget
from dualsft.errors import UserError

Side = Literal["chosen", "random", "lowest", "all"]
Group = Literal["plasticity", "stability"]
BASE = "base model"
"""How the untouched model is called among the methods."""
_SET_BY_THE_GRID = {
    "seed_everything": "the grid's seeds",
    "model.selection": "the method's selection",
    "output_dir": "--output_dir",
    "data.train": "the grid's config, as one pool is compared",
}
"""Keys that no method sets -> what sets them."""
_LOSSES = ("loss", "perplexity", "bits_per_byte", "brier_score")
_MODEL = "model.model_name_or_path"


@dataclass(frozen=True)
class Budgets:
    """How much is chosen of each side.

    Attributes:
        data: Examples to train on: a fraction in (0, 1], a count, or null for all.
        parameters: Weights to train: the same.
    """

    data: Budget = None
    parameters: Budget = None

    def __post_init__(self) -> None:
        check_budget("data", self.data)
        check_budget("parameters", self.parameters)


@dataclass(frozen=True)
class Method:
    """One way of choosing what is trained.

    Attributes:
        select: Settings of `dualsft select` by dotted key, over those of the configuration.
        fit: Settings of `dualsft fit` in the same way.
        examples: Which examples are trained on: the chosen ones, as many at random, as many with the lowest scores, or
            all.
        weights: Which weights are trained, in the same way.
        data: Settings of a selection that chooses the examples alone, over those of ``select``; the weights are then
            chosen by a second selection, whose pool these examples are.
        parameters: Settings of that second selection, over those of ``select``.
        adapter: The configuration of an adapter of PEFT to train in place of weights of the model.
    """

    select: dict[str, Any] = field(default_factory=dict)
    fit: dict[str, Any] = field(default_factory=dict)
    examples: Side = "chosen"
    weights: Side = "chosen"
    data: dict[str, Any] | None = None
    parameters: dict[str, Any] | None = None
    adapter: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("select", "fit", "data", "parameters"):
            _check_keys(name, getattr(self, name) or {})
        sides = (self.examples, self.weights)
        if self.is_sequential and (self.adapter is not None or sides != ("chosen", "chosen")):
            raise UserError(
                "data and parameters choose both sides, one after the other; drop examples, weights and adapter."
            )
        if "model.data_budget" in (self.parameters or {}):
            raise UserError("parameters has model.data_budget, but weights are chosen on all that data chose; drop it.")
        if self.adapter is not None and self.weights != "chosen":
            raise UserError(f"an adapter is trained in place of weights; drop weights: {self.weights}.")

    @property
    def is_sequential(self) -> bool:
        """Whether the weights are chosen by a selection of their own, on what another one chose."""
        return self.data is not None or self.parameters is not None


@dataclass(frozen=True)
class Evaluation:
    """What a trained model is measured on: a data set, or tasks.

    Attributes:
        data: A data set, of any kind that ``data.validation`` takes.
        tasks: Tasks of the lm-evaluation-harness, separated by commas or as a list.
        max_new_tokens: Tokens of the answers that are generated and compared with the responses; 0 for none.
        forgetting: Whether to report by how much the loss is higher than the base model's.
        group: The group whose mean this evaluation is part of.
        metric: What counts in the group and in figures; ``loss`` unless given, of tasks ``acc``.
        validate: Settings of `dualsft validate` by dotted key, such as limit and few_shot.
    """

    data: str | None = None
    tasks: str | list[str] | None = None
    max_new_tokens: int = 0
    forgetting: bool = False
    group: Group | None = None
    metric: str | None = None
    validate: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.data is None) == (self.tasks is None):
            raise UserError("an evaluation takes data or tasks, one of the two; without them it has no metrics.")
        if self.max_new_tokens < 0:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; give 0 for no answers, or how long they may be.")
        if self.data is None and (self.forgetting or self.max_new_tokens):
            raise UserError("tasks have no use for forgetting and max_new_tokens; drop them.")
        _check_keys("validate", self.validate)
        if own := [key for key in ("data.validation", "tasks") if key in self.validate]:
            raise UserError(f"validate has {own[0]}, which is the evaluation's own {own[0].split('.')[0]}; drop it.")

    @property
    def main_metric(self) -> str:
        """What counts in the group and in figures."""
        return self.metric or ("loss" if self.data is not None else "acc")


@dataclass(frozen=True)
class Grid:
    """A comparison.

    Attributes:
        config: The files of the ordinary configuration of select, fit and validate; later ones override earlier ones.
        methods: What is compared, by name.
        budgets: Under which budgets.
        seeds: With which seeds; each is the ``seed_everything`` of selections and fits.
        evaluations: What each trained model, and the base model, is measured on, by name. Without any, nothing is
            trained: the selections are made for their patterns, and each method may name a model of its own.
        patterns: Whether to write where the chosen weights are, by layer and kind of module, and how far the choices of
            the methods overlap.
    """

    config: list[str]
    methods: dict[str, Method]
    budgets: list[Budgets]
    seeds: list[int]
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    patterns: bool = False

    def __post_init__(self) -> None:
        for name in ("methods", "budgets", "seeds"):
            if not getattr(self, name):
                raise UserError(f"The grid has no {name}; give at least one.")
        if not self.evaluations and not self.patterns:
            raise UserError("The grid has no evaluations; give at least one, or patterns: true to train nothing.")
        if odd := [seed for seed in self.seeds if not 0 <= seed < 2**32]:
            raise UserError(f"seeds holds {odd[0]}; give whole numbers from 0 to 4294967295.")
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError("seeds holds a seed twice, which would count one run as two; drop it.")
        if BASE in self.methods:
            raise UserError(f"methods names one {BASE!r}, as the untouched model is called; give it another name.")
        self._check_models()
        self._check_groups()

    def group(self, name: Group) -> dict[str, Evaluation]:
        """The evaluations of a group."""
        return {key: of for key, of in self.evaluations.items() if of.group == name}

    def _check_models(self) -> None:
        """Refuse another model than the one that all methods are measured against."""
        for name, method in self.methods.items() if self.evaluations else ():
            if any(_MODEL in (of or {}) for of in (method.select, method.fit, method.data, method.parameters)):
                raise UserError(
                    f"methods.{name} has {_MODEL}, which follows the grid's config, as one model is trained and "
                    "measured; drop it, or the evaluations."
                )

    def _check_groups(self) -> None:
        """Refuse a mean over losses and shares, which has no unit."""
        for name in ("plasticity", "stability"):
            kinds = {is_loss(of.main_metric): (key, of.main_metric) for key, of in self.group(name).items()}
            if len(kinds) > 1:
                (one, metric), (other, loss) = kinds[False], kinds[True]
                raise UserError(
                    f"The group {name} has no mean over the {metric} of {one} and the {loss} of {other}; give "
                    f"evaluations.{other} another metric, such as token_accuracy, or leave one out of the group."
                )


def is_loss(metric: str) -> bool:
    """Whether lower is better, by a metric's name."""
    name = metric.rpartition("/")[2]
    return name in (*_LOSSES, "forgetting") or name.endswith(_LOSSES)


def _check_keys(place: str, overrides: Mapping[str, Any]) -> None:
    """Refuse settings that the grid gives itself."""
    for key in overrides:
        if not isinstance(key, str):
            raise UserError(f"{place} has the key {key!r}, which is not text; give dotted keys such as model.scorer.")
        if any(name.startswith(f"{key}.") for name in _SET_BY_THE_GRID):
            raise UserError(f"{place} has the whole section {key}; give its settings by dotted key, as {key}.NAME.")
        if key in _SET_BY_THE_GRID:
            raise UserError(f"{place} has {key}, which follows {_SET_BY_THE_GRID[key]}; drop it.")
