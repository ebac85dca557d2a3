"""Checks of a grid's methods against the model and the pool, and the places in the grid that mistakes are told with."""

import re
from argparse import ArgumentError
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

from dualsft.allocators import Budget, count_of
from dualsft.commands.sentences import plainly
from dualsft.commands.shared_scores import data_allocator
from dualsft.errors import UserError, naming
from dualsft.evaluation.tasks import INSTALL
from dualsft.experiments.grid import Evaluation
from dualsft.models.loading import empty_model
from dualsft.selection.parameter_choice import parameter_budget
from dualsft.selection.settings import SelectionSettings
from dualsft.selection.warmup import Warmup


@contextmanager
def telling(place: str) -> Iterator[None]:
    """Start what is said of a mistake with its place in the grid."""
    try:
        with naming(place):
            yield
    except ArgumentError as error:
        unknown = re.search(r"unrecognized arguments: --([\w.]+)", str(error))
        told = (
            f"there is no setting {unknown[1]}; --print_config of the command shows them."
            if unknown
            else plainly(error)
        )
        raise UserError(f"{place}: {told}") from error


def check_tasks_can_be_run(evaluation: Evaluation) -> None:
    """Refuse tasks where the lm-evaluation-harness is not installed."""
    if evaluation.tasks is not None and find_spec("lm_eval") is None:
        raise UserError(f"tasks need the lm-evaluation-harness, which is not installed; install it with {INSTALL}.")


def chosen_count(settings: Mapping[str, Any], rows: int) -> int:
    """How many examples a selection chooses, about; refuses budgets that cannot be met."""
    of: dict[str, Any] = settings["model"]
    alone = SelectionSettings(
        parameter_budget=of["parameter_budget"],
        trainable=of["trainable"],
        frozen=of["frozen"],
        preconditioner="none",
        warmup=Warmup(fraction=0),
    )
    parameter_budget(alone, weight_counts(of["model_name_or_path"]))
    budget: Budget = of["data_budget"]
    if isinstance(budget, int) and data_allocator(settings).unit == "tokens":
        return rows
    return count_of("model.data_budget", budget, rows, "examples")


def check_order(place: str, part: str, settings: Mapping[str, Any]) -> None:
    """Refuse to choose the examples, or the weights, of a method by a selection that takes all of them."""
    whole = {"data": "parameters", "parameters": "data"}[part]
    if settings["model"]["order"] == whole:
        raise UserError(
            f"{place}: the selection of {part} has model.order {whole}, which takes all of the {part}; set it to both."
        )


@cache
def weight_counts(model: str) -> dict[str, int]:
    """Parameter name -> the number of its weights."""
    return {name: weight.numel() for name, weight in empty_model(model).named_parameters()}
