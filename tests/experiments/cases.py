"""A grid and outcomes of its runs, made up."""

from collections.abc import Mapping, Sequence
from typing import Any

from dualsft.experiments.grid import Budgets, Evaluation, Grid, Method
from dualsft.experiments.results import Outcome, Results, base_outcome

BUDGETS = Budgets(0.1, 0.2)
COSTS = {"seconds": 2.0, "peak_memory_bytes": 2**20, "bytes_on_disk": 2**21, "trained_weights": 30}
BASE = {"target": {"loss": 3.0, "token_accuracy": 0.5}, "general": {"loss": 1.0, "token_accuracy": 0.8}}


def grid(**changes: Any) -> Grid:
    """Two methods, one budget, two seeds; a target set, and a general one that reports forgetting."""
    usual: dict[str, Any] = {
        "config": ["job.yaml"],
        "methods": {"both": Method(), "random": Method(examples="random", weights="random")},
        "budgets": [BUDGETS],
        "seeds": [0, 1],
        "evaluations": {
            "target": Evaluation(data="target.jsonl", group="plasticity"),
            "general": Evaluation(data="general.jsonl", forgetting=True, group="stability"),
        },
    }
    return Grid(**{**usual, **changes})


def outcome(method: str, seed: int, target: float, general: float = 1.0, **changes: Any) -> Outcome:
    """A run with these losses."""
    metrics = {
        "target": {"loss": target, "token_accuracy": 0.6},
        "general": {"loss": general, "token_accuracy": 0.75},
    }
    return Outcome(
        **{"method": method, "budgets": BUDGETS, "seed": seed, "metrics": metrics, "costs": COSTS, **changes}
    )


def results(losses: Mapping[str, Sequence[float]], **changes: Any) -> Results:
    """Results of methods with these losses on the target, one for each seed."""
    outcomes = [outcome(name, seed, loss) for name, of in losses.items() for seed, loss in enumerate(of)]
    methods = {name: Method() for name in losses}
    return Results(grid(methods=methods, **changes), base_outcome(BASE), outcomes)
