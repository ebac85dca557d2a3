"""What was found, as the columns that the selection directory keeps of every example."""

from collections.abc import Collection
from typing import Any

from dualsft.data import Examples
from dualsft.selection.scoring import ExampleScores

SET_SCORE = "score_"
"""Before the name of a validation set: its own score of each example."""


def example_table(
    pool: Examples, found: ExampleScores, nonfinite: Collection[int], chosen: Collection[int], named: bool
) -> dict[str, list[Any]]:
    """Column name -> one value per record of ``data.train``: what ``examples.parquet`` holds.

    Args:
        pool: The examples.
        found: Their scores.
        nonfinite: Ids of those whose loss or gradient is not finite.
        chosen: Ids of those chosen.
        named: Whether each validation set has a column of its own.
    """
    ids = range(len(pool.status))
    sets = found.by_set if named else {}
    return {
        "example_id": list(ids),
        "score": [found.scores.get(i) for i in ids],
        "num_tokens": [int(n) for n in pool.num_tokens],
        "status": ["nonfinite" if i in nonfinite else status for i, status in enumerate(pool.status)],
        "selected": [i in chosen for i in ids],
        **{f"{SET_SCORE}{name}": [scores.get(i) for i in ids] for name, scores in sets.items()},
    }


def token_table(pool: Examples, found: ExampleScores) -> dict[str, list[Any]]:
    """Column name -> one value per scored example: what ``token_scores.parquet`` holds."""
    ids = sorted(found.tokens)
    return {
        "example_id": ids,
        "token_id": [list(pool.dataset[i]["input_ids"]) for i in ids],
        "score": [found.tokens[i].tolist() for i in ids],
    }
