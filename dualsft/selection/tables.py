"""The tables of a selection, from the results of a run."""

from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from dualsft.data.module import InstructionDataModule
from dualsft.matrix.example_values import ExampleValues
from dualsft.selection.near_duplicates import duplicate_column
from dualsft.selection.order import Chosen
from dualsft.selection.outcome import Outcome


def example_table(data: InstructionDataModule, chosen: Chosen, outcome: Outcome) -> dict[str, Any]:
    """The columns of ``examples.parquet``: name -> an array of one value per record of ``data.train``.

    Each named validation set has a column for its scores, and each measured statistic, except sketches, has one. Where
    near-duplicates were dropped, ``duplicate_of`` is the example that stands in the place of each.
    """
    pool, found = data.train_examples, chosen.example_scores
    count = len(pool)
    sets = found.by_set if data.named_validation else {}
    selected = np.zeros(count, bool)
    selected[list(chosen.examples)] = True
    ids, numbers = found.scores.ids, outcome.measured.items()
    finite = {name: ExampleValues(ids, of.at(ids)) for name, of in numbers if isinstance(of, ExampleValues)}
    columns = {
        "example_id": pa.array(np.arange(count)),
        "score": _column(found.scores, count),
        "num_tokens": pa.array(np.asarray(pool.num_tokens, np.int64)),
        "status": _statuses(pool.status, outcome.nonfinite),
        "selected": pa.array(selected),
        **{f"score_{name}": _column(scores, count) for name, scores in sets.items()},
        **{name: _column(values, count) for name, values in finite.items()},
    }
    return {**columns, **duplicate_column(range(count), chosen.duplicate_of)}


def _column(values: ExampleValues, count: int) -> pa.Array:
    """The values by example id as an array, null where there is none."""
    column, missing = np.zeros(count), np.ones(count, bool)
    column[values.ids], missing[values.ids] = values.numbers, False
    return pa.array(column, mask=missing)


def _statuses(statuses: Iterable[str], nonfinite: Collection[int]) -> pa.Array:
    """The status of each example, with those found not to be finite."""
    return pa.array("nonfinite" if i in nonfinite else status for i, status in enumerate(statuses))


def token_table(data: InstructionDataModule, chosen: Chosen) -> dict[str, list[Any]]:
    """The columns of ``token_scores.parquet``: name -> one value per scored example.

    ``supervised`` tells the tokens of responses, which are learnt, from those of prompts.
    """
    tokens, pool = chosen.example_scores.tokens, data.train_examples.dataset
    ids = sorted(tokens)
    return {
        "example_id": ids,
        "token_id": [list(pool[i]["input_ids"]) for i in ids],
        "score": [tokens[i].tolist() for i in ids],
        "supervised": [[label != -100 for label in pool[i]["labels"]] for i in ids],
    }
