"""The directions u by which one scoring checkpoint scores weights and examples, one for each validation set.

A scorer computes them from statistics of the objective V; second-order ones need the pool's mean gradient ḡ first.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from dualsft.matrix.sketches import Measurement
from dualsft.models.lazy import LazyTensors
from dualsft.runs.folder import RunFolder
from dualsft.runs.progress import say
from dualsft.selection.directions import Statistics, scorer_direction
from dualsft.selection.known_objective import KnownObjective
from dualsft.selection.settings import SelectionSettings
from dualsft.selection.step import Along, along_pool_step, bind, describe, is_bound, settle, warning


class DirectionRule(ABC):
    """Gives the direction u of each validation set at one scoring checkpoint.

    Attributes:
        sets: The names of the validation sets.
        needs_pool_gradient: Whether u can be computed only once Σ_i g_i is known.
    """

    sets: list[str]
    needs_pool_gradient: bool

    @abstractmethod
    def directions(self, sums: Mapping[str, Tensor] | None, count: int, occasion: str) -> list[LazyTensors]:
        """u of each set: parameter name -> u, of the (local) shape, computed when it is read.

        Args:
            sums: Σ_i g_i by parameter name, if it is known.
            count: How many examples it is over, or will be.
            occasion: Suffix that tells the names of passes from earlier ones'.
        """

    def prediction(self, sums: Mapping[str, Tensor], count: int) -> dict[str, Any] | None:
        """Describe the quadratic's prediction along the last pool step, for the manifest, if there is one.

        Args:
            sums: Σ_i g_i by parameter name.
            count: How many examples it is over.
        """
        return None

    def prior_cosines(self) -> dict[str, float | None]:
        """Validation set -> the cosine of its loss's gradient with the prior's; None where there is none."""
        return dict.fromkeys(self.sets)

    def half_directions(self) -> list[LazyTensors]:
        """u by the first halves of all sets, then by the second ones, as last computed; empty without halves."""
        return []

    @abstractmethod
    def measurement(self, names: Collection[str]) -> Measurement:
        """The statistics to measure of single examples."""


class ScorerDirections(DirectionRule):
    """The directions of the run's scorer.

    Args:
        settings: The scorer and the step size.
        objective: V of each validation set, whose gradients have been taken.
        run: Records on which step size the scores depend.
        named: Whether the validation sets have names.
    """

    def __init__(self, settings: SelectionSettings, objective: KnownObjective, run: RunFolder, named: bool) -> None:
        self._settings, self._objective, self._run, self._named = settings, objective, run, named
        self.sets, self.needs_pool_gradient = objective.sets, objective.needs_pool_gradient
        self._step: float | None = None if settings.step_size == "auto" else settings.step_size
        self._along: dict[str, Along] = {}
        self._statistics: dict[str, Statistics] = {}

    def measurement(self, names: Collection[str]) -> Measurement:
        """The statistics to measure of single examples, under the preconditioner."""
        return self._objective.measurement(names)

    def prior_cosines(self) -> dict[str, float | None]:
        """Validation set -> the cosine of its loss's gradient with the prior's; None where there is none."""
        return self._objective.prior_cosines()

    def half_directions(self) -> list[LazyTensors]:
        """u by the first halves of all sets, then by the second ones, as last computed; empty without halves."""
        assert self._step is not None
        gradients = {name: self._objective.half_gradients(name) for name in self._statistics}
        return [
            scorer_direction(self._settings.scorer, replace(self._statistics[name], validation_gradient=v), self._step)
            for half in zip(*gradients.values(), strict=True)
            for name, v in zip(self._statistics, half, strict=True)
        ]

    def directions(self, sums: Mapping[str, Tensor] | None, count: int, occasion: str) -> list[LazyTensors]:
        """u of each set; settle η, on which the run's scores depend from here on."""
        statistics = self._objective.statistics(sums, count, occasion)
        if sums is not None:
            self._measure(statistics)
        self._step = settle(self._settings.step_size, list(self._along.values()), is_bound(self._run))
        bind(self._run, self._settings.step_size)
        self._statistics = statistics
        return [scorer_direction(self._settings.scorer, of, self._step) for of in statistics.values()]

    def prediction(self, sums: Mapping[str, Tensor], count: int) -> dict[str, Any]:
        """Describe the quadratic's prediction along the last pool step, for each set too if the sets have names."""
        assert self._step is not None
        if not self._along:
            self._measure(self._objective.statistics(sums, count))
        description = describe(self._step, self._along, self._named)
        if message := warning(description):
            say(message)
        return description

    def _measure(self, statistics: Mapping[str, Statistics]) -> None:
        self._along = {name: along_pool_step(self._settings.scorer, of) for name, of in statistics.items()}
