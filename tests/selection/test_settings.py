"""A new option of select is one field: all else that has to know of it goes by the field's role."""

from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from jsonargparse import ArgumentParser

from dualsft import SelectionModule
from dualsft.allocators import Diverse, GlobalTopK, LayerQuota, TopK
from dualsft.commands import allocate
from dualsft.paths import TargetPath
from dualsft.scorers import DiagonalFisher, FirstOrder
from dualsft.selection import Warmup
from dualsft.selection.describe import what_scores_rest_on
from dualsft.selection.json_values import at
from dualsft.selection.manifest import PUBLISHED
from dualsft.selection.near_duplicates import NearDuplicates
from dualsft.selection.paths.settings import PathSettings
from dualsft.selection.prior import Prior
from dualsft.selection.settings import (
    CHOICE,
    Role,
    SelectionSettings,
    add_later_options,
    describe_settings,
    option,
    options,
    recorded,
    stored_settings,
)
from tests.selection.test_prior import Ridge

THEN: Any = {"order": "parameters_then_data"}
OTHERS: dict[str, dict[str, Any]] = {
    "scorer": {"scorer": DiagonalFisher("empirical_fisher")},
    "preconditioner": {"preconditioner": "none"},
    "normalize": {"normalize": "tokens"},
    "path": {"path": PathSettings(along=TargetPath())},
    "step_size": {"step_size": 1.0},
    "parameter_budget": {"parameter_budget": 3},
    "data_budget": {"data_budget": None},
    "parameter_allocator": {"parameter_allocator": LayerQuota()},
    "data_allocator": {"data_allocator": TopK(reverse=True)},
    "near_duplicates": {"near_duplicates": NearDuplicates(0.9)},
    "trainable": {"trainable": ["proj"]},
    "frozen": {"frozen": ["norm"]},
    "warmup": {"warmup": Warmup(0.5)},
    "prior": {"prior": Prior(0.5)},
    "objectives": {"objectives": [Ridge()]},
    "combination": {"combination": "max"},
    "order": {"order": "data_then_parameters"},
    "rounds": {"rounds": 2},
    "dtype": {"dtype": "float64"},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "offload_optimizer": {"offload_optimizer": "always"},
    "offload_sums": {"offload_sums": "always"},
    "compile": {"compile": True},
    "parameter_scores": {"parameter_scores": "none"},
    "token_scores": {"token_scores": True},
    "stability": {"stability": True},
    "save_minutes": {"save_minutes": 1.0},
}
"""Another value of each option, where two rounds are allowed."""


def settings(**given: Any) -> SelectionSettings:
    """Options under which every order and every other value is allowed."""
    return SelectionSettings(**{"order": "parameters_then_data", **given})


def test_every_option_has_a_role_and_a_place() -> None:
    """The manifest holds each option at its key, but those that only say how it is run, and it holds nothing else."""
    described = describe_settings(SelectionSettings())
    assert {o.name for o in options()} == {field.name for field in fields(SelectionSettings)} == set(OTHERS)
    assert {o.role for o in options()} == set(get_args(Role))
    assert {o.name for o in options()} - {o.name for o in recorded()} == {
        "dtype",
        "gradient_checkpointing",
        "offload_optimizer",
        "offload_sums",
        "compile",
        "save_minutes",
    }
    assert list(described) == list(dict.fromkeys(o.key.partition(".")[0] for o in recorded()))
    assert [at(described, o.key) for o in recorded()]
    assert sum(len(told) if key in ("order", "budgets") else 1 for key, told in described.items()) == len(recorded())


@pytest.mark.parametrize("name", OTHERS)
def test_what_follows_from_a_role(name: str) -> None:
    """Another value is told at the option's key alone; it is part of what the scores rest on, or free, by its role."""
    (option,) = (o for o in options() if o.name == name)
    for order in ("both", "parameters_then_data"):
        if name in ("order", "rounds") and order == "both":
            continue
        before = settings(order=order)
        after = replace(before, **OTHERS[name])
        one, other = describe_settings(before), describe_settings(after)
        changed = [key for key in one if one[key] != other[key]]
        assert changed == ([] if option.role == "running" else [option.key.partition(".")[0]])
        module: Any = SimpleNamespace(settings=before)
        rests_on = what_scores_rest_on(module, one)
        free = option.role == "step" or (order == "both" and option.role in ("parameters", "data"))
        assert all((key not in rests_on) == free for key in changed)
        assert (option.name in CHOICE) == (option.role in ("parameters", "data"))
        assert all((key in PUBLISHED) == (option.role != "published") for key in changed)


def test_allocate_takes_the_choice() -> None:
    """Its options are those of the roles that decide a choice, and the paths of the records."""
    assert [taken for _, _, taken in allocate.TAKEN.values()] == [CHOICE, ("train", "train_split")]
    parser = allocate._parser()
    assert {key.split(".")[1] for key, _ in parser.get_defaults().items() if key.startswith("model.")} == set(CHOICE)


def test_the_command_line_has_every_option() -> None:
    """SelectionModule takes them all, with their defaults and what their docstring says, in the order of the fields."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SelectionModule, "model")
    actions = {action.dest: action for action in parser._actions}
    defaults = parser.get_defaults().model
    assert list(vars(defaults)) == ["model_name_or_path", *OTHERS]
    documented = SelectionSettings.__doc__ or ""
    for field in fields(SelectionSettings):
        assert f"        {field.name}: " in documented
        action = actions.get(f"model.{field.name}")
        if action is not None and field.name not in ("near_duplicates", "warmup", "prior", "path"):
            assert str(action.help).split(" (type")[0].split("\n")[0][:40] in " ".join(documented.split())
            assert defaults[field.name] == field.default


def test_what_is_not_given_has_its_default() -> None:
    """Null is for the default; the side that an order takes whole has neither budget nor allocator."""
    made = SelectionSettings(scorer=None, trainable=None, objectives=None)  # type: ignore[arg-type]
    assert isinstance(made.scorer, FirstOrder)
    assert (made.trainable, made.frozen, made.objectives) == ([], [], [])
    assert isinstance(made.parameter_allocator, GlobalTopK)
    assert isinstance(made.data_allocator, TopK)
    data = SelectionSettings(order="data", parameter_budget=3, parameter_allocator=LayerQuota(), data_budget=4)
    assert (data.parameter_budget, data.data_budget) == (None, 4)
    assert isinstance(data.parameter_allocator, GlobalTopK)
    parameters = SelectionSettings(order="parameters", data_allocator=Diverse())
    assert (parameters.parameter_budget, parameters.data_budget) == (0.1, None)
    assert isinstance(parameters.data_allocator, TopK)


def test_an_option_that_nobody_has_is_refused() -> None:
    """A misspelt one is no option."""
    with pytest.raises(TypeError, match="scoorer"):
        SelectionModule("nowhere", scoorer=FirstOrder())


@dataclass(frozen=True)
class Wider(SelectionSettings):
    """Two more options."""

    novelty: float = option(0.5, "direction", later=True)
    token_budget: int | None = option(None, "data", key="budgets.tokens", later=True)


def test_a_new_option_is_one_field() -> None:
    """It is written and read in its place, and a manifest that is older than it means its default."""
    old = describe_settings(SelectionSettings())
    wide = describe_settings(Wider(novelty=0.7, token_budget=9))
    assert list(wide) == [*list(old)[:9], "novelty", *list(old)[9:]]
    assert list(old)[8:10] == ["path", "parameter_scores"]
    assert wide["budgets"] == {"parameters": 0.1, "data": 0.1, "tokens": 9}
    assert {n: stored_settings(wide, Wider)[n] for n in ("novelty", "token_budget")} == {
        "novelty": 0.7,
        "token_budget": 9,
    }
    add_later_options(old, Wider)
    assert stored_settings(old, Wider) == stored_settings(describe_settings(Wider()), Wider)
