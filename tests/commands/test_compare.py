"""`dualsft compare` as its user sees it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from dualsft.cli import run
from dualsft.commands.compare import compare, write
from dualsft.commands.compare_jobs import CompareJobs
from dualsft.errors import UserError
from dualsft.experiments.bank import Bank, Result, write_result
from dualsft.experiments.grid import Grid
from dualsft.experiments.grid_file import read_grid
from dualsft.experiments.jobs import Job
from tests.world.data import sums
from tests.world.embedded import ROOT
from tests.world.jobs import write_inputs, write_job

METHODS: dict[str, Any] = {
    "both": {},
    "data only": {"weights": "all"},
    "less then lift": {"data": {"model.data_allocator": "less"}, "parameters": {"model.parameter_allocator": "lift"}},
    "random": {"examples": "random", "weights": "random"},
    "everything": {"examples": "all", "weights": "all"},
}
SETS = {
    "target": {"data": "validation.jsonl", "group": "plasticity"},
    "general": {"data": "train.jsonl", "forgetting": True},
}
COSTS = {"seconds": 2.0, "peak_memory_bytes": 2**20, "bytes_on_disk": 2**21, "trained_weights": 30, "examples": 5}


@pytest.mark.parametrize("name", ["quickstart", "masks"])
def test_a_shipped_comparison_has_jobs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its settings are known, its names are registered, and its data are there; run as its page says."""
    monkeypatch.chdir(ROOT)
    grid = read_grid(f"configs/comparisons/{name}.yaml")
    jobs = CompareJobs(grid, Bank(tmp_path))
    assert {trial.recipe.method for trial in jobs.trials} == set(grid.methods)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, its data, and one configuration for select, fit and validate."""
    folder = tmp_path_factory.mktemp("job")
    rows = sums(30)
    inputs = write_inputs(folder, rows[:24], rows[24:])
    model = {"model_name_or_path": inputs.model, "warmup": {"fraction": 0.5, "learning_rate": 1e-3}}
    optimizer = {"class_path": "AdamW", "init_args": {"lr": 1e-3}}
    write_job(folder, inputs, model=model, optimizer=optimizer, data={"batch_size": 4}, trainer={"max_epochs": 1})
    return folder


def write_grid(job: Path, name: str = "grid.yaml", **changes: Any) -> Path:
    """Write a grid beside the job: all methods, one budget, two seeds."""
    usual = {
        "config": "job.yaml",
        "methods": METHODS,
        "budgets": [{"data": 5, "parameters": 0.2}],
        "seeds": [0, 1],
        "evaluations": SETS,
    }
    (job / name).write_text(yaml.safe_dump({**usual, **changes}, sort_keys=False))
    return job / name


class Pretence:
    """Does jobs without a model: each has metrics and costs of its own, and some fail.

    Attributes:
        done: The jobs that were done, in order.
    """

    def __init__(self, bank: Bank, fails: Sequence[str] = (), stops_after: int = 10**6) -> None:
        self.bank, self.fails, self.stops_after = bank, fails, stops_after
        self.done: list[Job] = []

    def __call__(self, jobs: Sequence[Job], label: str) -> Mapping[str, Result]:
        for job in self.bank.missing(jobs):
            if len(self.done) == self.stops_after:
                raise KeyboardInterrupt
            self.done.append(job)
            write_result(self.bank.put(job), self._result(job))
        return {job.key: found for job in jobs if (found := self.bank.result(job)) is not None}

    def _result(self, job: Job) -> Result:
        if any(name in job.name for name in self.fails):
            return Result(error="memory ran out")
        loss = 3.0 if job.kind == "evaluate" else 1 + int(job.key[:4], 16) / 2**16
        metrics = {"loss": loss, "token_accuracy": 0.5}
        return Result(metrics=dict.fromkeys(job.settings.get("evaluations", {}), metrics), costs=COSTS)


def made(job: Path, bank: Path, **changes: Any) -> tuple[Grid, CompareJobs]:
    """A grid of the job, and its jobs."""
    grid = read_grid(str(write_grid(job, **changes)))
    return grid, CompareJobs(grid, Bank(bank))


def test_scores_are_computed_once(job: Path, tmp_path: Path) -> None:
    """One selection for each seed scores for all methods but the weights that are chosen on chosen examples."""
    _, jobs = made(job, tmp_path)
    kinds = {kind: [j for j in jobs.all if j.kind == kind] for kind in ("select", "allocate", "fit", "evaluate")}
    selections = {j.key: j for j in kinds["select"]}
    pools = [j.inputs["data.train"] for j in selections.values()]
    assert sum(pool == str(job / "train.jsonl") for pool in pools) == 2
    assert sum(pool.startswith(str(tmp_path)) for pool in pools) == 2
    assert len(kinds["fit"]) == len(METHODS) * 2
    assert len({j.key for j in kinds["fit"]}) == len(kinds["fit"])


def test_stages_come_after_what_they_need(job: Path, tmp_path: Path) -> None:
    """Every job of a selection is there once, and each that it needs is in an earlier stage."""
    _, jobs = made(job, tmp_path)
    stage = {j.key: k for k, stage in enumerate(jobs.stages) for j in stage}
    assert len(stage) == sum(map(len, jobs.stages))
    for trial in jobs.trials:
        found = [stage[needed.key] for needed in trial.needs]
        assert found == sorted(set(found))


@pytest.mark.slow
def test_failures_stop_nobody_else(job: Path, tmp_path: Path) -> None:
    """A failed run is told with its reason; what rests on a failed selection is not tried, and all else is done."""
    grid, jobs = made(job, tmp_path / "bank")
    pretence = Pretence(Bank(tmp_path / "bank"), fails=["weights of less then lift", "random (5"])
    results = compare(grid, jobs, pretence)
    failed = {(of["method"], of["seed"]): of["error"] for of in results.failures()}
    assert failed == {
        **{("less then lift", s): f"weights of less then lift, seed {s}: memory ran out" for s in (0, 1)},
        **{("random", s): "memory ran out" for s in (0, 1)},
    }
    assert not any(j.kind == "fit" and j.name.startswith("less") for j in pretence.done)
    printed = write(results, tmp_path)
    assert "failed: memory ran out" in printed
    assert json.loads((tmp_path / "failures.json").read_text()) == results.failures()
    methods = set(pq.read_table(tmp_path / "results.parquet")["method"].to_pylist())
    assert methods == {"base model", "both", "data only", "everything"}


def test_a_base_model_that_cannot_be_evaluated_ends_it(job: Path, tmp_path: Path) -> None:
    """Nothing is selected or trained then."""
    grid, jobs = made(job, tmp_path)
    pretence = Pretence(Bank(tmp_path), fails=["base model"])
    with pytest.raises(UserError, match="the base model cannot be evaluated: memory ran out"):
        compare(grid, jobs, pretence)
    assert len(pretence.done) == 1


@pytest.mark.slow
def test_killed_and_continued(job: Path, tmp_path: Path) -> None:
    """A comparison that is stopped after half of its jobs goes on with the others, to the same bytes."""
    grid, jobs = made(job, tmp_path / "bank")
    whole = Pretence(Bank(tmp_path / "whole"))
    write(compare(grid, made(job, tmp_path / "whole")[1], whole), tmp_path)
    expected = {name: (tmp_path / name).read_bytes() for name in ("table.md", "table.tex", "results.parquet")}
    first = Pretence(Bank(tmp_path / "bank"), stops_after=len(whole.done) // 2)
    with pytest.raises(KeyboardInterrupt):
        compare(grid, jobs, first)
    second = Pretence(Bank(tmp_path / "bank"))
    write(compare(grid, jobs, second), tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in expected} == expected
    assert len(first.done) + len(second.done) == len(whole.done)
    assert not {j.key for j in first.done} & {j.key for j in second.done}


def test_a_larger_grid_adds_what_is_new(job: Path, tmp_path: Path) -> None:
    """Methods that were run before are not run again, though another one that measures more could score for them."""
    methods = {name: METHODS[name] for name in ("both", "random")}
    grid, jobs = made(job, tmp_path, methods=methods)
    compare(grid, jobs, Pretence(Bank(tmp_path)))
    grid, jobs = made(job, tmp_path)
    pretence = Pretence(Bank(tmp_path))
    compare(grid, jobs, pretence)
    assert not [j.name for j in pretence.done if j.kind == "fit" and j.name.startswith(tuple(methods))]
    assert sum(j.kind == "select" for j in pretence.done) == 4  # what less measures, and lift on what it chose


def test_costs_include_the_selection_that_a_run_rests_on(job: Path, tmp_path: Path) -> None:
    """Time adds up over a run's selections where its choice is by scores, and is the fit's alone where it is not."""
    grid, jobs = made(job, tmp_path)
    results = compare(grid, jobs, Pretence(Bank(tmp_path)))
    seconds = {(of.method, of.seed): of.costs["seconds"] for of in results.outcomes}
    needs = {(t.recipe.method, t.recipe.seed): len(t.needs) for t in jobs.trials}
    assert seconds["random", 0] == seconds["everything", 0] == 2.0
    for method in ("both", "data only", "less then lift"):
        assert seconds[method, 0] == 2.0 * (1 + needs[method, 0])


WRONG = [
    ({"methods": {"a": {"select": {"model.scorr": "x"}}}}, r"methods\.a: .*model\.scorr"),
    ({"methods": {"a": {"fit": {"optimizer.lr": "fast"}}}}, r"methods\.a: .*optimizer"),
    ({"methods": {"a": {"select": {"model.scorer": "nosuch"}}}}, r"methods\.a: .*nosuch"),
    ({"budgets": [{"data": 25}]}, r"methods\.both: model\.data_budget is 25, but there are only 24 examples"),
    (
        {"budgets": [{"parameters": 10**9}]},
        r"methods\.both: model\.parameter_budget is 1,000,000,000, but there are only",
    ),
    ({"methods": {"a": {"select": {"model.data_budget": 99}}}}, r"methods\.a: model\.data_budget is 99"),
    ({"evaluations": {"a": {"data": "nosuch.jsonl"}}}, r"evaluations\.a: .*nosuch\.jsonl"),
    ({"evaluations": {"a": {"data": "train.jsonl", "validate": {"nosuch": 1}}}}, r"evaluations\.a: .*nosuch"),
    ({"methods": {"a": {"adapter": {"peft_type": "NOSUCH"}}}}, r"methods\.a: peft_type is NOSUCH; give one of"),
    (
        {"methods": {"a": {"adapter": {"peft_type": "LORA", "rr": 3}}}},
        r"methods\.a: PEFT refuses this LORA adapter: .*rr",
    ),
    ({"methods": {"a": {"select": {"model": {"data_budget": 2}}}}}, r"methods\.a: select has the whole section model"),
    ({"methods": {"a": {"parameters": {"model.data_budget": 2}}}}, r"methods\.a: parameters has model\.data_budget"),
    ({"methods": {"a": {"parameters": {"model.order": "data"}}}}, r"methods\.a: the selection of parameters has"),
    (
        {"methods": {"a": {"data": {"model.order": "parameters"}}}},
        r"methods\.a: the selection of data has model\.order",
    ),
    (
        {"evaluations": {"a": {"data": "train.jsonl", "validate": {"data.validation": "x.jsonl"}}}},
        r"evaluations\.a: validate has data\.validation",
    ),
    ({"config": "nosuch.yaml"}, r"The configuration nosuch\.yaml cannot be read"),
]


@pytest.mark.parametrize(("change", "told"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_mistakes_are_told_before_the_first_run(change: dict[str, Any], told: str, job: Path, tmp_path: Path) -> None:
    """Each mistake ends in one sentence with its place in the grid, and leaves nothing behind."""
    grid = write_grid(job, "wrong.yaml", **change)
    with pytest.raises(UserError, match=told):
        run(["compare", "--config", str(grid), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_grid_is_checked_before_the_folder(job: Path, tmp_path: Path) -> None:
    """A mistake in the grid is told whatever lies in the output folder, and then what is wrong with that."""
    (tmp_path / "out").write_text("a file")
    for change, told in (
        ({"budgets": [{"data": 25}]}, "there are only 24"),
        ({"methods": {"both": {}}}, "out is a file"),
    ):
        with pytest.raises(UserError, match=told):
            run(["compare", "--config", str(write_grid(job, **change)), "--output_dir", str(tmp_path / "out")])


def test_adapters_need_peft(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without PEFT an adapter is refused with what to install."""
    monkeypatch.setattr("dualsft.finetune.adapter.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"methods\.lora: .*pip install 'dualsft\[peft\]'"):
        made(job, tmp_path, methods={"lora": {"adapter": {"peft_type": "LORA"}}})


def test_dry_run(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says what would be done, and writes nothing."""
    grid = write_grid(job, methods={"both": {}})
    run(["compare", "--config", str(grid), "--output_dir", str(tmp_path / "out"), "--dry_run"])
    told = capsys.readouterr().out
    assert "to do  fit       both (5 of data, 20% of weights), seed 1" in told
    assert "5 of 5 jobs are to be done" in told
    assert not (tmp_path / "out").exists()
