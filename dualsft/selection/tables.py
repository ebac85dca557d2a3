"""The tables of a selection, from the results of a run."""

from typing import Any

from dualsft.data.module import InstructionDataModule
from dualsft.matrix.sketches import SKETCH
from dualsft.selection.near_duplicates import duplicate_column
from dualsft.selection.order import Chosen
from dualsft.selection.outcome import Outcome


def example_table(data: InstructionDataModule, chosen: Chosen, outcome: Outcome) -> dict[str, list[Any]]:
    """The columns of ``examples.parquet``: name -> one value per record of ``data.train``.

    Each named validation set has a column for its scores, and each measured statistic, except sketches, has one. Where
    near-duplicates were dropped, ``duplicate_of`` is the example that stands in the place of each.
    """
    pool, found = data.train_examples, chosen.example_scores
    ids = range(len(pool))
    sets = found.by_set if data.named_validation else {}
    numbers = {name: values for name, values in outcome.measured.items() if name != SKETCH}
    return {
        "example_id": list(ids),
        "score": [found.scores.get(i) for i in ids],
        "num_tokens": [int(n) for n in pool.num_tokens],
        "status": ["nonfinite" if i in outcome.nonfinite else status for i, status in enumerate(pool.status)],
        "selected": [i in chosen.examples for i in ids],
        **{f"score_{name}": [scores.get(i) for i in ids] for name, scores in sets.items()},
        **{name: [float(values[i]) if i in found.scores else None for i in ids] for name, values in numbers.items()},
        **duplicate_column(ids, chosen.duplicate_of),
    }


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
