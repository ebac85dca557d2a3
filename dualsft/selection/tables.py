"""What a pass found, as the columns that the selection directory keeps of every example."""

from typing import Any

from dualsft.data import Examples
from dualsft.gradients import GradientPass


def example_table(pool: Examples, scored: GradientPass, chosen: set[int]) -> dict[str, list[Any]]:
    """Column name -> one value per record of ``data.train``: what ``examples.parquet`` holds."""
    ids = range(len(pool.status))
    return {
        "example_id": list(ids),
        "score": [scored.rows[0].get(i) for i in ids],
        "num_tokens": [int(n) for n in pool.num_tokens],
        "status": ["nonfinite" if i in scored.nonfinite else status for i, status in enumerate(pool.status)],
        "selected": [i in chosen for i in ids],
    }


def token_table(pool: Examples, scored: GradientPass) -> dict[str, list[Any]]:
    """Column name -> one value per scored example: what ``token_scores.parquet`` holds."""
    ids = sorted(scored.tokens[0])
    return {
        "example_id": ids,
        "token_id": [list(pool.dataset[i]["input_ids"]) for i in ids],
        "score": [scored.tokens[0][i].tolist() for i in ids],
    }
