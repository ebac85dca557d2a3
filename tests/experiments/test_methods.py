"""What each method of a grid does."""

from typing import Any

import pytest

from dualsft.experiments.grid import Budgets, Method
from dualsft.experiments.methods import Recipe, recipes
from tests.experiments.cases import BUDGETS, grid

SETTINGS = ("model.data_budget", "model.parameter_budget", "seed_everything")


def of(method: Method, **changes: object) -> list[Recipe]:
    """The runs of one method."""
    return recipes(grid(methods={"it": method}, **changes))


def test_settings_reach_the_selection_and_the_fit() -> None:
    """Every run has the grid's budgets and its seed; a method's own settings go over them."""
    runs = of(Method(select={"model.scorer": "hessian_vector"}, fit={"optimizer.lr": 1e-3}))
    assert [run.seed for run in runs] == [0, 1]
    for run in runs:
        assert run.choice is not None
        assert [run.choice.settings[key] for key in SETTINGS] == [0.1, 0.2, run.seed]
        assert run.choice.settings["model.scorer"] == "hessian_vector"
        assert run.fit == {"optimizer.lr": 1e-3, "seed_everything": run.seed}


@pytest.mark.parametrize(
    ("method", "budgets", "rules"),
    [
        (Method(), BUDGETS, None),
        (Method(weights="all"), Budgets(0.1, None), None),
        (Method(select={"model.parameter_budget": None}), Budgets(0.1, None), None),
        (Method(select={"model.order": "parameters"}), Budgets(None, 0.2), None),
        (Method(examples="random", weights="random"), BUDGETS, ("random", "random")),
        (Method(examples="lowest"), BUDGETS, ("band", "chosen")),
        (Method(examples="random", weights="all"), Budgets(0.1, None), ("random", "chosen")),
    ],
)
def test_sides(method: Method, budgets: Budgets, rules: tuple[str, str] | None) -> None:
    """A side of which all is taken has no budget, and nothing of a side is drawn anew that was chosen."""
    run = of(method)[0]
    assert run.budgets == budgets
    assert run.choice is not None
    found = run.choice.settings
    assert (found["model.data_budget"], found["model.parameter_budget"]) == (budgets.data, budgets.parameters)
    assert (run.variant and (run.variant["examples"]["rule"], run.variant["weights"]["rule"])) == rules


def test_everything_needs_no_selection_and_no_second_budget() -> None:
    """What no budget changes is run once for each seed, however many budgets there are."""
    runs = of(Method(examples="all", weights="all"), budgets=[Budgets(0.1, 0.1), Budgets(0.2, 0.2)])
    assert [(run.choice, run.budgets, run.seed) for run in runs] == [(None, Budgets(), 0), (None, Budgets(), 1)]


def test_sequential_methods_choose_weights_on_chosen_examples() -> None:
    """The second selection's pool is what the first one chose, and both have the method's common settings."""
    allocators: dict[str, Any] = {
        "data": {"model.data_allocator": "less"},
        "parameters": {"model.parameter_allocator": "lift"},
    }
    run = of(Method(select={"model.dtype": "float32"}, **allocators))[0]
    second = run.choice
    assert second is not None
    assert second.of is not None
    assert second.of.settings["model.data_allocator"] == "less"
    assert second.of.settings["model.data_budget"] == 0.1
    assert second.settings["model.parameter_allocator"] == "lift"
    assert [second.settings[key] for key in SETTINGS] == [None, 0.2, 0]
    assert second.settings["model.dtype"] == second.of.settings["model.dtype"] == "float32"


@pytest.mark.parametrize(
    ("method", "uses"),
    [
        (Method(), True),
        (Method(examples="random", weights="random"), False),
        (Method(examples="random"), True),
        (Method(examples="random", weights="all"), False),
        (Method(examples="lowest", weights="all"), True),
        (Method(examples="all", weights="all"), False),
        (Method(adapter={"peft_type": "LORA"}), True),
        (Method(adapter={"peft_type": "LORA"}, examples="random"), False),
    ],
)
def test_whose_cost_includes_scores(method: Method, uses: bool) -> None:
    """A run bears the cost of scoring if and only if some side of what it trains was chosen by scores."""
    assert of(method)[0].uses_scores is uses


def test_the_configuration_may_choose_one_side() -> None:
    """Methods that set no order follow the configuration's: what it takes whole has no budget, and runs once."""
    methods = {
        "plain": Method(),
        "both": Method(select={"model.order": "both"}),
        "one after the other": Method(data={}),
    }
    both, few = Budgets(0.1, 0.2), Budgets(0.1, 0.05)
    found = recipes(grid(methods=methods, budgets=[both, few], seeds=[0]), order="data")
    assert [(run.method, run.budgets) for run in found] == [
        ("plain", Budgets(0.1, None)),
        *((name, budgets) for name in ("both", "one after the other") for budgets in (both, few)),
    ]
