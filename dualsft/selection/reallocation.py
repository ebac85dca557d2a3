"""Other budgets and allocators on the scores of a finished selection: without a model, and without scoring again."""

import hashlib
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor

from dualsft.allocators import DataAllocator
from dualsft.data.options import TRAIN
from dualsft.data.records import Records, read_records
from dualsft.data.selected import selected_ids
from dualsft.data.sources import Given, paths_of
from dualsft.errors import UserError
from dualsft.matrix.example_values import ExampleValues
from dualsft.matrix.pass_result import Statistic
from dualsft.matrix.sketches import SKETCH
from dualsft.models.loading import base_weights, model_fingerprint
from dualsft.runs.folder import RunFolder
from dualsft.runs.progress import PhaseLog, say
from dualsft.selection.artifact import Selection, load_selection
from dualsft.selection.data_choice import ChosenExamples, Pool, choose_data, data_budget
from dualsft.selection.describe import recounted
from dualsft.selection.diagnostics import WeightFigures, row_sources
from dualsft.selection.near_duplicates import DUPLICATE_OF, duplicate_column
from dualsft.selection.parameter_choice import all_that_may_be_chosen, choose_parameters, trainable_names
from dualsft.selection.settings import CHOICE, SelectionSettings, describe_settings, keys, recorded, stored_settings
from dualsft.selection.writing import publish, write_selection
from dualsft.storage.paths import expanded, link_or_copy, real
from dualsft.storage.writing import writing_to


def reallocate(
    selection: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    train: Given | None = None,
    train_split: str | None = None,
    overwrite: bool = False,
    config: str = "",
    **choice: Any,
) -> Selection:
    """Write the selection that `dualsft select` would have made with these budgets and allocators.

    Memory holds the records, the parameter scores (float32) and the mask (one byte per weight); nothing larger except
    the data of an allocator's ``needs``: the base model's weights, or the sketches.

    Args:
        selection: A finished selection directory; it stays as it is. The new one shares its score files where the
            file system has hard links.
        output_dir: Folder to write the new selection to.
        train: The sources of the records that the selection was made from; None for the recorded ones.
        train_split: Split to load of those that are Hugging Face datasets; None for the recorded split.
        overwrite: Replace the results of an earlier run in ``output_dir``.
        config: YAML that replays the run, kept beside the results.
        choice: Options of `SelectionSettings` that decide a choice; `CHOICE` lists them.

    Raises:
        UserError: if the selection, its records or the output folder cannot be used, the records are not those that it
            was made from, or the budgets cannot be met; the output folder is then as it was.
    """
    if strange := sorted(set(choice) - set(CHOICE)):
        raise TypeError(f"{', '.join(strange)} decides no choice; the options are {', '.join(CHOICE)}")
    settings = SelectionSettings(**choice)
    source = load_selection(selection)
    _check_apart(source.folder, Path(expanded(os.fspath(output_dir))))
    described = describe_settings(settings)
    options = {key: described[key] for key in keys("parameters", "data")}
    _check_order(source, options)
    made_from = source.about.data.train
    given, split = train or made_from.path, train_split or made_from.split
    run = RunFolder(output_dir, overwrite=overwrite, inputs=(str(source.folder), *paths_of(given)), resumable=False)
    log = PhaseLog(show=False)
    with log.phase("allocation", examples=0):
        records = _records(source, given, split)
        chosen = _examples(source, records, settings)
        mask = _weights(source, settings)
    digest = hashlib.sha256((source.folder / "manifest.json").read_bytes()).hexdigest()
    options["allocated_from"] = {"folder": os.fspath(selection), "manifest": digest}
    counts = recounted(source.manifest, mask, selected=len(chosen.ids), near_duplicates=len(chosen.duplicate_of))
    run.claim({"command": "allocate", **options})
    _publish(
        run,
        source,
        manifest={**_kept(source.manifest, given, split), **options, "counts": counts, "phases": log.as_json()},
        examples=_with_choice(source.examples, chosen),
        mask=mask,
        selected_lines=[records.line(i) for i in sorted(chosen.ids)],
        config=config,
        sources=row_sources(records, settings.data_allocator),
        basis=source.basis,
        weights=None if _has_scores(source) else WeightFigures(source.parameters, source.diagnostics.parameters),
    )
    return load_selection(run.path)


def _publish(run: RunFolder, source: Selection, **parts: Any) -> None:
    """Put the source's scores and the new choice into the claimed folder, the manifest last; or leave it as it was."""
    try:
        staged = run.staging()
        with writing_to(run.path):
            for file in source.score_files:
                link_or_copy(file, staged / file.name)
        write_selection(staged, **parts)
        publish(staged, run.path)
    except BaseException:  # nothing of seconds' work is worth resuming
        run.release()
        raise
    run.finish()


def sides_behind_scores(order: str, rounds: int) -> list[str]:
    """The sides whose choice the scores of a selection depend on."""
    first, _, second = order.partition("_then_")
    if rounds > 1:
        return [first, second]
    return {"both": [], "parameters": ["data"], "data": ["parameters"]}.get(order, [first])


def _check_order(source: Selection, options: dict[str, Any]) -> None:
    """Refuse to change a side that the other was scored by: the scores would change with it."""
    before, now = source.about.settings, stored_settings({**source.manifest, **options})
    changed = {option.role for option in recorded() if before[option.name] != now[option.name]}
    order, rounds = before["order"], before["rounds"]
    fixed = sides_behind_scores(order, rounds)
    if spoilt := [side for side in fixed if side in changed]:
        raise UserError(
            f"{source.folder} was made with model.order {order} and model.rounds {rounds}, where the choice of the "
            f"{' and the '.join(spoilt)} is what the scores rest on; select again with the new settings."
        )


def _check_apart(selection: Path, output: Path) -> None:
    here = real(output)
    if real(selection) in (here, *here.parents):
        raise UserError(f"--output_dir {output} lies in {selection}, which this run reads; choose another folder.")


def _records(source: Selection, given: Given, split: str) -> Records:
    try:
        records = read_records(given, split, TRAIN)
    except UserError as error:
        if given != source.about.data.train.path:
            raise
        raise UserError(
            f"The data that {source.folder} was made from cannot be read ({str(error).rstrip('.')}); say with "
            "--data.train where it lies now."
        ) from error
    selected_ids(source.folder, records)  # refuses other data
    return records


def _examples(source: Selection, records: Records, settings: SelectionSettings) -> ChosenExamples:
    num_tokens = source.examples["num_tokens"].to_numpy()
    # select computes its budget before it knows which are finite
    with_response = pc.is_in(source.examples["status"], pa.array(["ok", "nonfinite"])).to_numpy()
    due = data_budget(settings, num_tokens[with_response])
    pool = Pool(records, num_tokens, source.about.data.format)
    return choose_data(settings, due, _numbers(source, "score"), pool, _measured(source, settings.data_allocator))


def _numbers(source: Selection, name: str) -> ExampleValues:
    """A column of the examples' table where it is not null."""
    column = source.examples[name]
    there = column.is_valid().to_numpy()
    return ExampleValues(np.flatnonzero(there), column.to_numpy()[there])


def _measured(source: Selection, allocator: DataAllocator) -> dict[str, Statistic]:
    """The statistics that the allocator needs, read from the selection; refused if it does not hold them."""
    found: dict[str, Statistic] = {}
    for name in allocator.needs:
        if name == SKETCH:
            found[name] = source.sketches()
        elif name in source.examples.column_names:
            found[name] = _numbers(source, name)
        if not found.get(name):
            raise UserError(
                f"{type(allocator).__name__} needs the {name} of each example, which {source.folder} does not hold; "
                "select again with this allocator."
            )
    return found


def _has_scores(source: Selection) -> bool:
    return source.about.settings["parameter_scores"] != "none"


def _weights(source: Selection, settings: SelectionSettings) -> dict[str, Tensor]:
    if not _has_scores(source):
        return _same_weights(source, settings)
    if source.about.settings["parameter_scores"] == "bfloat16":
        say(f"{source.folder} keeps scores of weights in bfloat16: near the cut, select may choose others.")
    scores = source.parameter_scores()
    if not scores and source.about.path_walked and _took_all(source):  # none was scored
        if settings.parameter_budget is not None:
            raise UserError(
                f"{source.folder} took all weights and scored none; select again with model.parameter_budget "
                f"{settings.parameter_budget}."
            )
        return all_that_may_be_chosen(settings, {name: part.shape for name, part in source.mask().items()})
    available = sum(score.numel() for score in scores.values())
    if available != (due := source.about.counts.parameters.scored):
        raise UserError(
            f"{source.folder} has lost parameter scores: {available:,} of {due:,} are there; make the selection again."
        )
    return choose_parameters(settings, scores, partial(_base_weights, source))


def _took_all(source: Selection) -> bool:
    """Whether a selection chose all weights that its patterns allow."""
    before, mask = source.about.settings, source.mask()
    allowed = trainable_names(before["trainable"], before["frozen"], mask)
    return source.about.counts.parameters.selected == sum(mask[name].numel() for name in allowed)


def _same_weights(source: Selection, settings: SelectionSettings) -> dict[str, Tensor]:
    """The mask of a selection without scores of weights; refused if other weights are asked for."""
    described, before = describe_settings(settings), source.about.settings
    asked = stored_settings({**source.manifest, **{key: described[key] for key in keys("parameters")}})
    if changed := [o.name for o in recorded() if o.role == "parameters" and asked[o.name] != before[o.name]]:
        raise UserError(
            f"{source.folder} was made with model.parameter_scores none, so its weights stay as they are; drop "
            f"{', '.join(f'model.{name}' for name in changed)}, or select again."
        )
    return source.mask()


def _base_weights(source: Selection) -> dict[str, Tensor]:
    """The weights of the model that the selection was made for; refused if it has changed or is gone."""
    model = source.about.model
    if model_fingerprint(model.name_or_path) != model.fingerprint:
        raise UserError(
            f"{model.name_or_path} has other weights than when {source.folder} was made; select again, or take an "
            "allocator that does not need the weights."
        )
    return base_weights(model.name_or_path, model.dtype)


def _kept(manifest: dict[str, Any], given: Given, split: str) -> dict[str, Any]:
    """The manifest's entries that another choice keeps; a control's mark is dropped, as scores decide again."""
    train = {**manifest["data"]["train"], "path": given, "split": split}
    kept = {**manifest, "data": {**manifest["data"], "train": train}}
    return {key: value for key, value in kept.items() if key != "control"}


def _with_choice(examples: pa.Table, chosen: ChosenExamples) -> pa.Table:
    place, selected = examples.schema.get_field_index("selected"), np.zeros(len(examples), bool)
    selected[list(chosen.ids)] = True
    table = examples.set_column(place, examples.schema.field(place), pa.array(selected))
    table = table.drop_columns([name for name in (DUPLICATE_OF,) if name in table.column_names])
    for name, twins in duplicate_column(range(len(examples)), chosen.duplicate_of).items():
        table = table.append_column(name, pa.array(twins, pa.int64()))
    return table.combine_chunks()  # otherwise its pages on disk would differ from a fresh table's
