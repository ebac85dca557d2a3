"""The number of phases, before the first of them."""

from pathlib import Path
from typing import Any

import pytest

from dualsft.scorers import DiagonalFisher, FirstOrder, HessianVector
from dualsft.selection import Warmup
from dualsft.selection.phase_plan import count_phases
from dualsft.selection.prior import Prior
from dualsft.selection.settings import SelectionSettings
from tests.world.data import sums
from tests.world.faults import PoolAware
from tests.world.jobs import SGD, Inputs, select, write_inputs

TURNS: dict[str, Any] = {"order": "data_then_parameters", "data_budget": 3}
SETTINGS: dict[str, dict[str, Any]] = {
    "least": {},
    "warm-up and prior": {"warmup": Warmup(fraction=0.5), "prior": Prior(weight=0.5)},
    "Fisher": {"scorer": DiagonalFisher(source="empirical_fisher")},
    "Hessian": {"scorer": HessianVector(), "step_size": 1e-4},
    "differences": {"scorer": HessianVector("finite_difference"), "step_size": 1e-4, "prior": Prior(weight=0.5)},
    "by turns": {**TURNS, "scorer": FirstOrder()},
    "halves": {"stability": True, "scorer": HessianVector(), "step_size": 1e-4},
    "rounds": {"order": "parameters_then_data", "data_budget": 3, "scorer": PoolAware(), "rounds": 2},
    "Hessian by turns": {**TURNS, "scorer": HessianVector(), "step_size": 1e-4},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A tiny model and eight sums."""
    return write_inputs(tmp_path_factory.mktemp("inputs"), sums(8), sums(3))


@pytest.mark.parametrize("named", SETTINGS)
def test_the_phases_are_as_many_as_were_planned(named: str, inputs: Inputs, tmp_path: Path) -> None:
    """Whatever the scorer, the terms and the order."""
    options = {**SGD, **SETTINGS[named]}
    made = select(inputs, tmp_path / "selection", options)
    names = [phase["name"] for phase in made.manifest["phases"]]
    assert count_phases(SelectionSettings(**options), 1) == len(names), names
