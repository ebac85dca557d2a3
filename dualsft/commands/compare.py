"""`dualsft compare`: methods x budgets x seeds, each trained and evaluated under the same settings."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from dualsft.commands.compare_jobs import CompareJobs, Trial
from dualsft.commands.compare_patterns import PATTERNS, chosen_by, write_patterns
from dualsft.commands.keys import check_options
from dualsft.commands.parsing import add_experiment_options, add_folder_options, check_output_dir
from dualsft.errors import UserError
from dualsft.experiments.bank import Bank, Result
from dualsft.experiments.comparison_tables import cost_table, quality_table
from dualsft.experiments.figures import draw_comparison
from dualsft.experiments.grid import Grid
from dualsft.experiments.grid_file import as_yaml, read_grid
from dualsft.experiments.jobs import Job
from dualsft.experiments.report_folder import ReportFolder
from dualsft.experiments.results import Outcome, Results, base_outcome, check_metrics, parquet_table, plain
from dualsft.experiments.schedule import complete, plan, workers_for
from dualsft.runs.bars import numbered
from dualsft.storage.writing import replacing, write_atomically, writing_to

DESCRIPTION = (
    "Trains what each method of a grid chooses, under each budget and seed and otherwise the same settings, and "
    "measures it. The same command goes on where an earlier one stopped; finished runs are never repeated."
)
Do = Callable[[Sequence[Job], str], Mapping[str, Result]]
"""Does those of some jobs that are missing, under a label for the progress bar; the results by key."""
_WRITTEN = ("bank", "settings", "results.parquet", "table.md", "table.tex", "failures.json", "figures", *PATTERNS)


def compare_command(arguments: Sequence[str]) -> None:
    """Compare, or say what would be done."""
    parser = _parser()
    check_options(parser, "dualsft compare", arguments)
    options = parser.parse_args(arguments)
    check_output_dir(options)
    if options.config is None:
        raise UserError("--config is not given; name the file of the grid.")
    grid = read_grid(options.config)
    try:
        _compare(grid, options)
    except KeyboardInterrupt as stop:
        raise UserError("The comparison was interrupted; the same command goes on from what is finished.") from stop


def _compare(grid: Grid, options: Namespace) -> None:
    bank = Bank(options.bank or os.path.join(options.output_dir, "bank"))
    with workers_for(options.parallel) as workers:
        jobs = CompareJobs(grid, bank)
        output = ReportFolder(options.output_dir, options.overwrite, _WRITTEN)
        bank.check()
        if options.dry_run:
            print(plan(bank, jobs.all, len(workers)))
            return
        output.claim(_replay(grid), dict(zip(_copies(grid), grid.config, strict=True)))

        def do(some: Sequence[Job], label: str) -> Mapping[str, Result]:
            return complete(bank, some, workers, label)

        results = compare(grid, jobs, do) if grid.evaluations else None
        if results is None:
            make_selections(jobs, do)
    if results is not None:
        print(write(results, output.path))
    if grid.patterns:
        print(write_patterns(chosen_by(jobs, bank), output.path))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="dualsft compare", description=DESCRIPTION, exit_on_error=False)
    parser.add_argument("-c", "--config", type=str | None, help="The grid: methods, budgets, seeds and evaluations.")
    add_folder_options(parser, resumable=False)
    add_experiment_options(parser)
    return parser


def compare(grid: Grid, jobs: CompareJobs, do: Do) -> Results:
    """Do the jobs of a grid: the base model's evaluations, the selections, and what can be trained with these.

    Raises:
        UserError: if the base model cannot be evaluated, or has not the main metric of an evaluation.
    """
    assert jobs.base is not None
    phases = len(jobs.stages) + 2
    first = do([jobs.base], numbered("base model", 1, phases))[jobs.base.key]
    if first.error is not None:
        raise UserError(f"the base model cannot be evaluated: {first.error}")
    base = base_outcome(first.metrics)
    check_metrics(grid, base)
    found = make_selections(jobs, do, before=1, after=1)
    ready = [trial.job for trial in jobs.trials if not _lacks(trial.needs, found)]
    found |= do(ready, numbered("fits", phases, phases))
    return Results(grid, base, [_outcome(trial, found) for trial in jobs.trials])


def make_selections(jobs: CompareJobs, do: Do, before: int = 0, after: int = 0) -> dict[str, Result]:
    """Make the selections, and return their results by key; those that need one that failed are not tried.

    Their phases are numbered with the phases that come ``before`` and ``after`` them.
    """
    found: dict[str, Result] = {}
    for number, stage in enumerate(jobs.stages, before + 1):
        label = numbered("selections", number, before + len(jobs.stages) + after)
        found |= do([job for job in stage if not _lacks(jobs.needs_of(job), found)], label)
    return found


def _lacks(needs: Sequence[Job], found: Mapping[str, Result]) -> str:
    """Why a job cannot be done: the failure of the first one that it needs; empty if it can."""
    return next((f"{job.name}: {error}" for job in needs if (error := found[job.key].error)), "")


def _outcome(trial: Trial, found: Mapping[str, Result]) -> Outcome:
    recipe = trial.recipe
    blank = Outcome(recipe.method, recipe.budgets, recipe.seed)
    if reason := _lacks(trial.needs, found):
        return replace(blank, error=reason)
    result = found[trial.job.key]
    if result.error is not None:
        return replace(blank, error=result.error)
    scored = [found[job.key].costs for job in trial.needs] if recipe.uses_scores else []
    return replace(blank, metrics=plain(result.metrics), costs=_together(result.costs, scored))


def _together(fit: Mapping[str, float], selections: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The costs of a fit with those of the selections that it rests on."""
    parts = [fit, *selections]
    return {
        **fit,
        "seconds": sum(of["seconds"] for of in parts),
        "peak_memory_bytes": max(of["peak_memory_bytes"] for of in parts),
    }


def _replay(grid: Grid) -> str:
    """The grid as its folder keeps it, with the configuration's files beside it."""
    return as_yaml(Grid(**{**vars(grid), "config": _copies(grid)}))


def _copies(grid: Grid) -> list[str]:
    """Names for the copies of the configuration's files, in their order."""
    return [f"settings/{k}-{Path(file).name.removeprefix(f'{k}-')}" for k, file in enumerate(grid.config)]


def write(results: Results, folder: Path) -> str:
    """Write the reports of a comparison; return what is printed of them."""
    import pyarrow.parquet as pq

    tables = [quality_table(results), cost_table(results)]
    failures = results.failures()
    text = "\n\n".join([*(table.markdown() for table in tables), *_notes(results)])
    with writing_to(folder), replacing(folder / "results.parquet") as partial:
        pq.write_table(parquet_table(results.rows()), partial)
    write_atomically(folder / "table.md", f"{text}\n")
    write_atomically(folder / "table.tex", "\n\n".join(table.latex() for table in tables) + "\n")
    write_atomically(folder / "failures.json", json.dumps(failures, indent=2))
    shutil.rmtree(folder / "figures", ignore_errors=True)  # those of methods that are gone
    figures = draw_comparison(results, folder / "figures")
    files = ["results.parquet", "table.md", "table.tex", "failures.json", *(["figures/"] if figures else [])]
    return f"{text}\n\nwrote {folder}: {', '.join(files)}"


def _notes(results: Results) -> list[str]:
    """What a reader of the tables must know."""
    seeds = len({outcome.seed for outcome in results.outcomes})
    notes = ["Time is that of training, with the selection's where it uses scores, as if each run made its own."]
    if seeds > 1:
        notes.insert(
            0, "± is half of the 95% interval of the mean over seeds (Student's t); bold: better than all others."
        )
    else:
        notes.insert(0, "One seed gives no interval: differences may be chance.")
    failed = [f"- {of['run']}: {of['error']}" for of in results.failures()]
    return [*notes, *(["Failed:\n" + "\n".join(failed)] if failed else [])]
