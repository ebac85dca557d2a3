"""The grids of `configs/paper`: each is run in miniature, from the files as they are shipped."""

import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from dualsft.commands.compare import compare, make_selections, write
from dualsft.commands.compare_jobs import CompareJobs
from dualsft.commands.compare_patterns import chosen_by, write_patterns
from dualsft.commands.experiment_worker import execute, explain
from dualsft.errors import UserError
from dualsft.experiments.bank import Bank, Result, do
from dualsft.experiments.grid import Budgets, Evaluation, Grid, Method
from dualsft.experiments.grid_file import read_grid
from dualsft.experiments.jobs import Job
from tests.world.data import sums, write_jsonl
from tests.world.models import save_tiny_model

PAPER = Path(__file__).parents[2] / "configs" / "paper"
SHARED = ("base", "maths")
GRIDS = [path for path in sorted(PAPER.glob("*.yaml")) if path.stem not in SHARED]
SMALL: dict[str, Any] = {
    "model": {"dtype": "float32", "gradient_checkpointing": False, "warmup": {"learning_rate": 1e-3}, "step_size": 1.5},
    "optimizer": {"class_path": "AdamW", "init_args": {"lr": 1e-3}},
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 1,
        "accumulate_grad_batches": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
    },
    "run_model_code": True,
}
"""What is laid over a grid's configurations."""
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_choice": ["yes", "no"],
    "doc_to_target": 0,
    "metric_list": [{"metric": "acc"}],
}
WRITING = {"output_type": "generate_until", "generation_kwargs": {"until": ["\n"], "max_gen_toks": 2}}
TASKS: dict[str, dict[str, Any]] = {
    "arc_challenge": {**CHOICE, "task": "arc_challenge"},
    "piqa": {**CHOICE, "task": "piqa"},
    "one": {**CHOICE, "task": "mmlu_one"},
    "mmlu": {"group": "mmlu", "task": ["mmlu_one"], "aggregate_metric_list": [{"metric": "acc"}]},
    "gsm8k": {
        **WRITING,
        "task": "gsm8k",
        "filter_list": [{"name": "strict-match", "filter": [{"function": "take_first"}]}],
        "metric_list": [{"metric": "exact_match"}],
    },
    "humaneval": {
        **WRITING,
        "task": "humaneval",
        "unsafe_code": True,
        "filter_list": [{"name": "create_test", "filter": [{"function": "take_first"}]}],
    },
}
"""Task files by the names, and with the metrics, of the harness's."""


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that base.yaml describes, with two tiny models and tasks on local files, and what is laid over it."""
    folder = tmp_path_factory.mktemp("paper")
    save_tiny_model(folder / "model", hidden_size=16, intermediate_size=24)
    (folder / "models").mkdir()
    save_tiny_model(folder / "models" / "Llama-3.2-1B", hidden_size=16, intermediate_size=24, num_hidden_layers=3)
    (folder / "models" / "Qwen2.5-3B").symlink_to("Llama-3.2-1B")
    rows = sums(30)
    for name in ("code", "maths", "general", "tasks"):  # both pools are the same, so that their runs are
        (folder / name).mkdir()
        for part, of in (("train", rows[:24]), ("validation", rows[24:27]), ("test", rows[27:])):
            write_jsonl(folder / name / f"{part}.jsonl", of)
    _write_tasks(folder / "tasks")
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL))
    return folder


def _write_tasks(folder: Path) -> None:
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "test.jsonl"}},
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
    }
    for name, task in TASKS.items():
        whole = task if "group" in task else {**data, "doc_to_target": "{{response}}", **task}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(whole))
    with open(folder / "humaneval.yaml", "a") as stream:
        stream.write("metric_list: [{metric: !function metric.pass_at_k, aggregation: mean}]\n")
    (folder / "metric.py").write_text("def pass_at_k(references, predictions):\n    return {'pass@1': 0.5}\n")


@pytest.fixture(autouse=True)
def _set(paper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one path is set."""
    monkeypatch.setenv("DUALSFT_PAPER", str(paper))


def in_miniature(path: Path, paper: Path) -> Grid:
    """A shipped grid with another configuration laid over its own, one budget, one seed, and tasks that are here."""
    grid = read_grid(str(path))
    offline = {"task_folder": str(paper / "tasks"), "limit": 1}
    evaluations = {name: _offline(of, offline) for name, of in grid.evaluations.items()}
    return replace(
        grid,
        config=[*grid.config, str(paper / "small.yaml")],
        budgets=[Budgets(0.1, 0.1)],
        seeds=[0],
        evaluations=evaluations,
    )


def _offline(evaluation: Evaluation, settings: Mapping[str, Any]) -> Evaluation:
    return evaluation if evaluation.tasks is None else replace(evaluation, validate={**evaluation.validate, **settings})


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_every_name_in_a_grid_exists(path: Path, paper: Path, tmp_path: Path) -> None:
    """Keys, scorers, allocators, adapters and data of every method and evaluation are found, and budgets can be met."""
    grid = replace(in_miniature(path, paper), budgets=read_grid(str(path)).budgets)
    jobs = CompareJobs(grid, Bank(tmp_path))
    assert {trial.recipe.method for trial in jobs.trials} == set(read_grid(str(path)).methods)


def test_code_is_run_only_where_that_is_asked_for() -> None:
    """As shipped, no configuration allows a task to run what the model writes."""
    shipped = [yaml.safe_load(path.read_text()) for path in PAPER.parent.rglob("*.yaml")]
    assert [config["run_model_code"] for config in shipped if "run_model_code" in config] == [False]
    measures = [of.validate for path in GRIDS for of in read_grid(str(path)).evaluations.values()]
    assert not any("run_model_code" in settings for settings in measures)


class Here:
    """Does jobs in this process, and what several grids have in common once.

    The base model is measured on each set and task by itself. Trained models are measured on the target alone, and have
    the base model's figures elsewhere.

    Args:
        bank: Where the results are kept.
    """

    def __init__(self, bank: Bank) -> None:
        self._bank = bank
        self._base: dict[str, dict[str, float]] = {}

    def __call__(self, jobs: Sequence[Job], label: str) -> Mapping[str, Result]:
        return {job.key: self._done(job) for job in jobs}

    def _done(self, job: Job) -> Result:
        if "evaluations" not in job.settings:
            return self._one(job)
        if job.kind == "evaluate":
            results = [self._one(_measured_on(job, name)) for name in job.settings["evaluations"]]
            self._base = {name: metrics for result in results for name, metrics in result.metrics.items()}
            return Result(error=next((of.error for of in results if of.error), None), metrics=self._base)
        result = self._one(_measured_on(job, "target"))
        return replace(result, metrics={**self._base, **result.metrics})

    def _one(self, job: Job) -> Result:
        if self._bank.missing([job]):
            do(self._bank.put(job), execute, explain)
        found = self._bank.result(job)
        assert found is not None
        return found


def _measured_on(job: Job, name: str) -> Job:
    """The job with one of its evaluations."""
    others = {f"evaluations.{other}" for other in job.settings["evaluations"]} - {f"evaluations.{name}"}
    return replace(
        job,
        settings={**job.settings, "evaluations": {name: job.settings["evaluations"][name]}},
        inputs={key: path for key, path in job.inputs.items() if key not in others},
        fingerprints={key: found for key, found in job.fingerprints.items() if key not in others},
    )


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """One bank for all grids."""
    gc.freeze()  # what is collected after each job is then the job's
    return Bank(tmp_path_factory.mktemp("bank"))


def one_of_each_kind(methods: Mapping[str, Method]) -> dict[str, Method]:
    """The methods but for those that differ from an earlier one in numbers alone, such as the prior's weight."""
    kinds: dict[str, str] = {}
    for name, method in methods.items():
        kinds.setdefault(json.dumps(_without_numbers(asdict(method)), sort_keys=True), name)
    return {name: methods[name] for name in kinds.values()}


def _without_numbers(settings: Any) -> Any:
    if isinstance(settings, dict):
        return {key: _without_numbers(value) for key, value in settings.items()}
    return "number" if isinstance(settings, (int, float)) else settings


@pytest.mark.heavy
@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_every_grid_runs(path: Path, paper: Path, bank: Bank, tmp_path: Path) -> None:
    """Every kind of method is selected, trained and measured, and every table and figure is written."""
    pytest.importorskip("lm_eval", exc_type=ImportError)
    grid = in_miniature(path, paper)
    grid = replace(grid, methods=one_of_each_kind(grid.methods))
    jobs = CompareJobs(grid, bank)
    if grid.evaluations:
        results = compare(grid, jobs, Here(bank))
        assert "failed" not in write(results, tmp_path)
        assert results.failures() == []
        assert len(results.outcomes) == len(jobs.trials)
        measured = set(pq.read_table(tmp_path / "results.parquet")["evaluation"].to_pylist())
        assert measured == set(grid.evaluations)
    else:
        make_selections(jobs, Here(bank))
    if grid.patterns:
        write_patterns(chosen_by(jobs, bank), tmp_path)
        assert {"layers.md", "overlaps.md", "layers.parquet"} <= {file.name for file in tmp_path.iterdir()}
    assert list((tmp_path / "figures").glob("*.png"))


@pytest.mark.heavy
def test_humaneval_is_refused_unless_it_is_allowed(paper: Path, tmp_path: Path) -> None:
    """A grid that measures it ends before the first selection, in one sentence with the option."""
    grid = in_miniature(PAPER / "main-code.yaml", paper)
    grid = replace(grid, evaluations={"HumanEval": grid.evaluations["HumanEval"]})
    (paper / "refused.yaml").write_text(yaml.safe_dump({"run_model_code": False}))
    grid = replace(grid, config=[*grid.config, str(paper / "refused.yaml")])
    bank = Bank(tmp_path)
    with pytest.raises(UserError, match=r"the base model cannot be evaluated: .*'humaneval' runs code.*run_model_code"):
        compare(grid, CompareJobs(grid, bank), Here(bank))
    assert len(list(tmp_path.iterdir())) == 1
