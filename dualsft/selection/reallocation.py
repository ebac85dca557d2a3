"""Budgets spent anew on the scores of a finished selection: without a model, and without scoring again."""

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from dualsft.allocators import Budget, DataAllocator, ParameterAllocator, check_budget
from dualsft.data import FormatOptions, Records, read_records, selected_ids
from dualsft.errors import UserError
from dualsft.matrix.sketches import SKETCH
from dualsft.models.loading import base_weights, model_fingerprint
from dualsft.runs.folder import RunFolder
from dualsft.runs.progress import PhaseLog
from dualsft.selection.artifact import Selection, load_selection, publish, write_choice
from dualsft.selection.budgets import check_allocators
from dualsft.selection.data_choice import ChosenExamples, DataChoice, Pool, choose_data
from dualsft.selection.near_duplicates import NearDuplicates
from dualsft.selection.parameter_choice import ParameterChoice, choose_parameters
from dualsft.selection.parts import describe_part

_SIDES = {"parameters": ("parameter_allocator", "trainable", "frozen"), "data": ("data_allocator", "near_duplicates")}
"""What of a manifest, beside the budget, says how a side was chosen."""
_ABSENT = {"trainable": [], "frozen": [], "near_duplicates": asdict(NearDuplicates())}
"""What a manifest from before there was a setting means."""


def reallocate(
    selection: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    parameter_budget: Budget,
    data_budget: Budget,
    parameter_allocator: ParameterAllocator,
    data_allocator: DataAllocator,
    near_duplicates: NearDuplicates = NearDuplicates(),  # noqa: B008 (frozen)
    trainable: Sequence[str] = (),
    frozen: Sequence[str] = (),
    train: str | None = None,
    train_split: str | None = None,
    overwrite: bool = False,
    config: str = "",
) -> Selection:
    """Write the selection that `dualsft select` would have made with these budgets and allocators.

    Memory holds the records, the parameter scores (float32) and the mask (one byte per weight); nothing larger but
    what an allocator needs beside: the base model's weights, or the sketches.

    Args:
        selection: A finished selection directory; it stays as it is. The new one shares its score files where the
            file system has hard links.
        output_dir: Where the new selection goes.
        parameter_budget: Weights to choose: a fraction in (0, 1] of those that may be, a count, or None for all.
        data_budget: Examples to choose: a fraction in (0, 1] of those with a response, a count, or None for all.
        parameter_allocator: The rule that spends the parameter budget.
        data_allocator: The rule that spends the data budget.
        near_duplicates: Which texts count as the same; of those only the one with the highest score may be chosen.
        trainable: Patterns for the parameters that may be chosen; empty for all.
        frozen: Patterns for those that may not even so.
        train: Where the records lie that the selection was made from; None for where they lay then.
        train_split: Split to load if that is a Hugging Face dataset; None for the one that it was made from.
        overwrite: Replace what an earlier run left in ``output_dir``.
        config: YAML that replays the run, kept beside the results.

    Raises:
        UserError: if the selection, its records or the output folder cannot be used, the records are not those that it
            was made from, or the budgets cannot be met; the output folder is then as it was.
    """
    check_budget("model.parameter_budget", parameter_budget)
    check_budget("model.data_budget", data_budget)
    check_allocators(parameter_allocator, data_allocator)
    source = load_selection(selection)
    _check_apart(source.folder, Path(output_dir))
    examples = DataChoice(data_allocator, data_budget, near_duplicates)
    weights = ParameterChoice(parameter_allocator, parameter_budget, trainable, frozen, lambda: _base_weights(source))
    spent = _describe_choices(weights, examples)
    _check_order(source, spent)
    made_from = source.manifest["data"]["train"]
    path, split = train or made_from["path"], train_split or made_from["split"]
    inputs = (str(source.folder), path)
    run = RunFolder(output_dir, overwrite=overwrite, inputs=inputs, resumable=False)
    log = PhaseLog(show=False)
    with log.phase("allocation", examples=0):
        records = _records(source, path, split)
        chosen = _examples(source, records, examples)
        mask = _weights(source, weights)
    spent["allocated_from"] = {"folder": os.fspath(selection), "manifest": _manifest_hash(source.folder)}
    outcome = {"counts": _counts(source, chosen, mask), "phases": log.as_json()}
    run.claim({"command": "allocate", **spent})
    _publish(
        run,
        source,
        manifest={**_kept(source.manifest, path, split), **spent, **outcome},
        examples=_with_selected(source.examples, chosen.ids),
        mask=mask,
        selected_lines=[records.line(i) for i in sorted(chosen.ids)],
        config=config,
    )
    return load_selection(run.path)


def _publish(run: RunFolder, source: Selection, **parts: Any) -> None:
    """Put the source's scores and the new choice into the claimed folder, the manifest last; or leave it as it was."""
    try:
        staged = run.staging()
        for file in source.score_files:
            _link(file, staged / file.name)
        write_choice(staged, **parts)
        publish(staged, run.path)
    except BaseException:  # nothing of seconds' work is worth resuming
        run.release()
        raise
    run.finish()


def _describe_choices(weights: ParameterChoice, examples: DataChoice) -> dict[str, Any]:
    """What the manifest says of them."""
    return {
        "parameter_allocator": describe_part(weights.allocator),
        "data_allocator": describe_part(examples.allocator),
        "near_duplicates": asdict(examples.near_duplicates),
        "trainable": list(weights.trainable),
        "frozen": list(weights.frozen),
        "budgets": {"parameters": weights.budget, "data": examples.budget},
    }


def _check_order(source: Selection, spent: dict[str, Any]) -> None:
    """Refuse to change a side that the other was scored by: with that, the scores would be others.

    Raises:
        UserError: naming the order of the selection.
    """
    before = source.manifest
    order, rounds = before["order"]["name"], before["order"]["rounds"]
    changed = {
        side: any(before.get(key, _ABSENT.get(key)) != spent[key] for key in keys)
        or before["budgets"][side] != spent["budgets"][side]
        for side, keys in _SIDES.items()
    }
    first, _, second = order.partition("_then_")
    fixed = {"both": [], "parameters": ["data"], "data": ["parameters"]}.get(order, [first])
    if rounds > 1:
        fixed = [first, second]
    if spoilt := [side for side in fixed if changed[side]]:
        raise UserError(
            f"{source.folder} was made with model.order {order} and model.rounds {rounds}, where the choice of the "
            f"{' and the '.join(spoilt)} is what the scores rest on; select again with the new settings."
        )


def _check_apart(selection: Path, output: Path) -> None:
    here = output.resolve()
    if selection.resolve() in (here, *here.parents):
        raise UserError(f"--output_dir {output} lies in {selection}, which this run reads; choose another folder.")


def _records(source: Selection, path: str, split: str) -> Records:
    try:
        records = read_records(path, split)
    except UserError as error:
        if path != source.manifest["data"]["train"]["path"]:
            raise
        raise UserError(
            f"The data that {source.folder} was made from cannot be read ({str(error).rstrip('.')}); say with "
            "--data.train where it lies now."
        ) from error
    selected_ids(source.folder, records)  # refuses other data
    return records


def _examples(source: Selection, records: Records, how: DataChoice) -> ChosenExamples:
    table = source.examples.to_pydict()
    ids, num_tokens = table["example_id"], table["num_tokens"]
    # select spends its budget before it knows which are finite
    with_response = [i for i, status in zip(ids, table["status"], strict=True) if status in ("ok", "nonfinite")]
    scored = {i: score for i, score in zip(ids, table["score"], strict=True) if score is not None}
    pool = Pool(records, num_tokens, FormatOptions(**source.manifest["data"]["format"]))
    due = how.count([num_tokens[i] for i in with_response])
    return choose_data(how, due, scored, pool, _measured(source, how))


def _measured(source: Selection, how: DataChoice) -> dict[str, dict[int, Tensor]]:
    """What the allocator needs beside the scores, as the selection holds it.

    Raises:
        UserError: if it does not.
    """
    found: dict[str, dict[int, Tensor]] = {}
    for name in how.allocator.needs:
        if name == SKETCH:
            found[name] = source.sketches()
        elif name in source.examples.column_names:
            numbers = enumerate(source.examples[name].to_pylist())
            found[name] = {i: torch.tensor(x, dtype=torch.float64) for i, x in numbers if x is not None}
        if not found.get(name):
            raise UserError(
                f"{type(how.allocator).__name__} needs the {name} of each example, which {source.folder} does not "
                "hold; select again with this allocator."
            )
    return found


def _weights(source: Selection, how: ParameterChoice) -> dict[str, Tensor]:
    scores = source.parameter_scores()
    available = sum(score.numel() for score in scores.values())
    if available != (due := source.manifest["counts"]["parameters"]["scored"]):
        raise UserError(
            f"{source.folder} has lost parameter scores: {available:,} of {due:,} are there; make the selection again."
        )
    return choose_parameters(how, scores)


def _base_weights(source: Selection) -> dict[str, Tensor]:
    """The weights of the model that the selection was made for.

    Raises:
        UserError: if it is another one by now, or has gone.
    """
    model = source.manifest["model"]
    if model_fingerprint(model["name_or_path"]) != model["fingerprint"]:
        raise UserError(
            f"{model['name_or_path']} has other weights than when {source.folder} was made; select again, or take an "
            "allocator that does not need the weights."
        )
    return base_weights(model["name_or_path"], model["dtype"])


def _counts(source: Selection, chosen: ChosenExamples, mask: dict[str, Tensor]) -> dict[str, Any]:
    before = source.manifest["counts"]
    weights = sum(int(part.sum()) for part in mask.values())
    return {
        **before,
        "examples": {**before["examples"], "selected": len(chosen.ids), "near_duplicates": chosen.collapsed},
        "parameters": {**before["parameters"], "selected": weights},
    }


def _kept(manifest: dict[str, Any], path: str, split: str) -> dict[str, Any]:
    """What another choice leaves true; a control that chose otherwise than by its scores is none any more."""
    data = manifest["data"]
    kept = {**manifest, "data": {**data, "train": {**data["train"], "path": path, "split": split}}}
    return {key: value for key, value in kept.items() if key != "control"}


def _with_selected(examples: pa.Table, chosen: set[int]) -> pa.Table:
    place = examples.schema.get_field_index("selected")
    selected = pa.array([i in chosen for i in examples["example_id"].to_pylist()], pa.bool_())
    table = examples.set_column(place, examples.schema.field(place), selected)
    return table.combine_chunks()  # as it was read it would be written in other pages than a fresh table


def _manifest_hash(folder: Path) -> str:
    return hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
