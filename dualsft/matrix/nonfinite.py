"""Which examples spoilt a batch: those whose loss or gradient is not finite by itself.

A batch whose losses or gradients are not all finite does not show by itself which example is to blame: in a packed row
one example's NaN spreads to its neighbours, and gradients are sums over the batch. So the suspects are looked at one by
one. What is finite alone stays.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dualsft.data.layout import Batch, Layout, keep_examples, one_example, widen
from dualsft.sharding.collectives import any_rank


def all_finite(values: Tensor) -> Bool[Tensor, ""]:
    """Whether all entries, of which there is one at least, are finite, without a copy; does not wait for the device."""
    return torch.stack(torch.aminmax(values)).isfinite().all()  # both are NaN if any entry is


def nonfinite_examples(batch: Batch, is_finite: Callable[[Batch], bool], suspects: Collection[int]) -> list[int]:
    """The ids of the suspects that are not finite alone, in the order of the batch.

    Args:
        batch: Padded or packed.
        is_finite: Whether a batch of one example has a finite loss, or gradient.
        suspects: Ids of the examples to look at.
    """
    ids = batch["example_id"].tolist()
    return [i for k, i in enumerate(ids) if i in suspects and not is_finite(one_example(batch, k))]


def drop_examples(batch: Batch, ids: Collection[int]) -> Batch:
    """The batch without the examples of these ids."""
    return keep_examples(batch, torch.tensor([i not in ids for i in batch["example_id"].tolist()], dtype=torch.bool))


@dataclass
class FiniteLosses:
    """A batch's losses, all finite and ready for backward on every rank, and what had to be set aside for that.

    Attributes:
        losses: l_i of each example of the batch; empty if the batch is.
        batch: What is left of the batch.
        alone: Examples that only padding or neighbours spoil: each is to be differentiated as a batch of its own.
        nonfinite: Ids of the examples whose loss is not finite.
    """

    losses: Float[Tensor, " example"]
    batch: Batch
    alone: list[Batch] = field(default_factory=list)
    nonfinite: set[int] = field(default_factory=set)


def finite_losses(
    batch: Batch, forward: Callable[[Batch], Tensor | None], is_finite: Callable[[Batch], bool], has_rows: bool
) -> FiniteLosses:
    """The losses of a batch without the examples that are not finite.

    Forward is repeated until it leaves nothing to set aside on any rank: a rank whose losses are finite repeats it too,
    as all ranks of a sharded model differentiate together.

    Args:
        batch: Padded or packed.
        forward: The losses of a batch; None if some output's axes are ambiguous at its width.
        is_finite: Whether the loss of a batch of one example is finite.
        has_rows: Whether outputs are split into examples, so that a batch must not have as many rows as tokens.
    """
    found = FiniteLosses(torch.empty(0), batch)
    while len(batch["example_id"]):
        # 1. Forward, on all ranks. It counts only if it is sound on each of them.
        if has_rows and len(batch["input_ids"]) == batch["input_ids"].shape[1]:
            batch = widen(batch)
        losses = forward(batch)
        finite = torch.tensor([]) if losses is None else losses.detach().isfinite().cpu()
        sound = losses is not None and bool(finite.all())
        if not any_rank(not sound):
            assert losses is not None
            found.losses = losses
            break
        # 2. Here it is sound, or will be in a wider batch: once more.
        if losses is None:
            batch = widen(batch)
        if losses is None or sound:
            continue
        # 3. Leave out the examples that are not finite alone, and see whether the others are now.
        suspects = set(batch["example_id"][~finite].tolist())
        bad = suspects if _is_one_example(batch) else set(nonfinite_examples(batch, is_finite, suspects))
        if bad:
            found.nonfinite |= bad
            batch = drop_examples(batch, bad)
            continue
        # 4. No example is to blame by itself: set the spoilt ones aside, each as a batch of its own.
        found.alone += [one_example(batch, k) for k, ok in enumerate(finite.tolist()) if not ok]
        batch = keep_examples(batch, finite)
    found.batch = batch
    return found


def _is_one_example(batch: Batch) -> bool:
    """Whether the batch is one example without padding, of which looking at it alone would show nothing new."""
    return len(batch["input_ids"]) == 1 and Layout.of(batch).spans == ((0, 0, batch["input_ids"].shape[1]),)
