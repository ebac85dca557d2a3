"""The patterns of a comparison: where the weights that its methods chose are, and how far their choices overlap."""

from pathlib import Path

from dualsft.commands.compare_jobs import CompareJobs, Trial
from dualsft.errors import UserError
from dualsft.experiments.bank import Bank
from dualsft.experiments.grid import Budgets
from dualsft.experiments.heat_map import draw_layers
from dualsft.experiments.overlaps import overlap_rows, overlap_table
from dualsft.experiments.patterns import Chosen, densities, density_rows
from dualsft.experiments.variants import examples_of, weights_of
from dualsft.selection import load_selection
from dualsft.storage.writing import replacing, write_atomically, writing_to

PATTERNS = ("layers.parquet", "layers.md", "overlaps.parquet", "overlaps.md")
"""The files that are written, beside figures."""


def chosen_by(jobs: CompareJobs, bank: Bank) -> list[Chosen]:
    """What each run trains, or would train; those that take all, or whose selection failed, are left out."""
    return [_chosen(trial, trial.selection) for trial in jobs.trials if trial.selection and _is_made(trial, bank)]


def _is_made(trial: Trial, bank: Bank) -> bool:
    found = [bank.result(job) for job in trial.needs]
    return all(result is not None and result.error is None for result in found)


def _chosen(trial: Trial, selection: str) -> Chosen:
    made = load_selection(selection)
    pool = load_selection(trial.pool) if trial.pool else made
    examples, mask = pool.example_ids, made.stored_masks()
    if (variant := trial.recipe.variant) is not None:
        counts = made.about.counts
        examples = examples_of(made, {"count": counts.examples.selected, **variant["examples"]})
        mask = weights_of(made, {"count": counts.parameters.selected, **variant["weights"]})
    scored = pool.examples["status"].to_pylist().count("ok")
    recipe = trial.recipe
    budgets = Budgets(recipe.budgets.data, None) if recipe.adapter is not None else recipe.budgets
    return Chosen(recipe.method, budgets, recipe.seed, frozenset(examples), scored, mask)


def write_patterns(chosen: list[Chosen], folder: Path) -> str:
    """Write the tables and the heat map; return what is printed of them.

    Raises:
        UserError: if no selection could be made.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not chosen:
        raise UserError("There are no patterns to write: no method has a selection, or all selections failed.")
    layers, overlaps = density_rows(chosen), overlap_rows(chosen)
    tables = densities(layers)
    for name, rows in (("layers", layers), ("overlaps", overlaps)):
        with writing_to(folder), replacing(folder / f"{name}.parquet") as partial:
            pq.write_table(pa.Table.from_pylist(rows), partial)
    parts = [f"## {table.title}\n\n{table.markdown()}" for table in tables]
    write_atomically(folder / "layers.md", "\n\n".join(["# Weights chosen, in percent", *parts]) + "\n")
    text = overlap_table(overlaps)
    write_atomically(folder / "overlaps.md", f"{text}\n")
    figures = draw_layers(tables, folder / "figures") if tables else []
    return f"{text}\n\nwrote {folder}: {', '.join([*PATTERNS, *(f'figures/{name}' for name in figures)])}"
