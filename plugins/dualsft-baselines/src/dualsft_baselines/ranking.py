"""The k largest of examples, and of the entries of many tensors, exactly."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from dualsft import ScoredExamples, UserError

Keys = Callable[[str], Tensor]
"""What a parameter's entries are ranked by, of its shape, by its name; made when it is asked for, twice."""


def largest_examples(examples: ScoredExamples, values: Tensor, count: int, reverse: bool = False) -> Tensor:
    """The ids of the examples with the largest values (smallest in reverse), ascending; ties go to the earlier row."""
    order = torch.sort(values, descending=not reverse, stable=True).indices
    return examples.example_id[order[:count]].sort().values


def largest_entries(names: Collection[str], keys: Keys, count: int) -> dict[str, Tensor]:
    """The entries with the largest keys; ties go to the first name, then the first index.

    Beside one parameter's keys, ``count`` keys or twice as many are held.

    Args:
        names: The parameters.
        keys: What their entries are ranked by.
        count: How many entries to choose, at most their number.

    Returns:
        Parameter name -> bool, of the parameter's shape: which entries are chosen.

    Raises:
        UserError: if a key is NaN.
    """
    threshold, ties = _threshold(names, keys, count)
    mask = {}
    for name in sorted(names):
        ranked = keys(name)
        chosen = ranked.flatten() > threshold
        at_threshold = (ranked.flatten() == threshold).nonzero().squeeze(1)[:ties]
        chosen[at_threshold] = True
        ties -= len(at_threshold)
        mask[name] = chosen.view(ranked.shape)
    return mask


def _threshold(names: Collection[str], keys: Keys, count: int) -> tuple[float, int]:
    """The smallest key that is still chosen, and how many entries that have it are."""
    if not count:
        return float("inf"), 0
    best = torch.empty(0)
    for name in names:
        ranked = keys(name).flatten()
        if bool(ranked.isnan().any()):
            raise UserError(f"{name} cannot be ranked, as some of its entries are not a number; mend the base model.")
        best = torch.cat([best.to(ranked.device), _top(ranked, count)])
        best = _top(best, count)
    threshold = best.min()
    return float(threshold), int((best == threshold).sum())


def _top(values: Tensor, count: int) -> Tensor:
    return values.topk(min(count, len(values)), sorted=False).values
