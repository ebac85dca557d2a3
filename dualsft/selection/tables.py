"""What was found, as the columns that the selection directory keeps of every example."""

from typing import Any

from dualsft.data import Examples
from dualsft.matrix.sketches import SKETCH
from dualsft.selection.order import Chosen
from dualsft.selection.scoring import ExampleScores, Scoring

SET_SCORE = "score_"
"""Before the name of a validation set: its own score of each example."""


def example_table(pool: Examples, chosen: Chosen, scoring: Scoring, named: bool) -> dict[str, list[Any]]:
    """Column name -> one value per record of ``data.train``: what ``examples.parquet`` holds.

    Args:
        pool: The examples.
        chosen: Their scores, and the ids of those chosen.
        scoring: Tells which are not finite, and what was measured beside.
        named: Whether each validation set has a column of its own.
    """
    ids, found = range(len(pool.status)), chosen.example_scores
    sets = {f"{SET_SCORE}{name}": scores for name, scores in found.by_set.items()} if named else {}
    numbers = {name: values for name, values in scoring.measured.items() if name != SKETCH}
    return {
        "example_id": list(ids),
        "score": [found.scores.get(i) for i in ids],
        "num_tokens": [int(n) for n in pool.num_tokens],
        "status": ["nonfinite" if i in scoring.nonfinite else status for i, status in enumerate(pool.status)],
        "selected": [i in chosen.examples for i in ids],
        **{name: [scores.get(i) for i in ids] for name, scores in sets.items()},
        **{name: [float(values[i]) if i in found.scores else None for i in ids] for name, values in numbers.items()},
    }


def token_table(pool: Examples, found: ExampleScores) -> dict[str, list[Any]]:
    """Column name -> one value per scored example: what ``token_scores.parquet`` holds."""
    ids = sorted(found.tokens)
    return {
        "example_id": ids,
        "token_id": [list(pool.dataset[i]["input_ids"]) for i in ids],
        "score": [found.tokens[i].tolist() for i in ids],
    }
