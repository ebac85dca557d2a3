"""Which examples are left out, and which are set aside, with a forward pass and a look at single examples made up."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dualsft.data.layout import Batch
from dualsft.matrix.nonfinite import FiniteLosses, all_finite, drop_examples, nonfinite_examples
from tests.cases import collate, make_examples, pack


def finite_losses(
    batch: Batch, forward: Callable[[Batch], Tensor | None], is_finite: Callable[[Batch], bool], has_rows: bool
) -> FiniteLosses:
    """The losses of a batch by this forward pass, repeated as often as needed."""
    found = FiniteLosses(batch, is_finite, has_rows)
    while found.pending:
        found.inspect(forward(found.batch))
    return found


def padded() -> Batch:
    """Examples 0 to 3, one to a row."""
    return collate(make_examples((9, 4, 13, 5)))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_bad_entry_is_seen(bad: float) -> None:
    """Whatever it is, and wherever."""
    assert bool(all_finite(torch.arange(4.0)))
    assert not bool(all_finite(torch.tensor([[1.0, 2.0], [bad, 3.0]])))


@pytest.mark.parametrize("batch", [padded(), pack([[3, 0], [2, 1]], make_examples((9, 4, 13, 5)))])
def test_suspects_are_looked_at_alone(batch: Batch) -> None:
    """In the order of the batch; examples that are no suspects are not looked at."""
    seen: list[int] = []

    def is_finite(example: Batch) -> bool:
        (i,) = example["example_id"].tolist()
        seen.append(i)
        return i != 0

    assert nonfinite_examples(batch, is_finite, {2, 0}) == [0]
    assert seen == [i for i in batch["example_id"].tolist() if i in (0, 2)]
    assert drop_examples(batch, {0})["example_id"].tolist() == [i for i in batch["example_id"].tolist() if i != 0]


def test_what_is_not_finite_alone_is_left_out_and_what_its_company_spoils_set_aside() -> None:
    """Example 1 is bad; it spoils 0 and 2 beside it, of which 2 is not finite in any company but its own."""

    def forward(batch: Batch) -> Tensor:
        ids = batch["example_id"].tolist()
        spoilt = {1, *((0, 2) if 1 in ids else ()), *((2,) if len(ids) > 1 else ())}
        return torch.tensor([torch.nan if i in spoilt else float(i) for i in ids])

    found = finite_losses(padded(), forward, lambda example: int(example["example_id"]) != 1, has_rows=False)
    assert found.nonfinite == {1}
    assert found.losses is not None
    assert found.losses.tolist() == [0.0, 3.0]
    assert found.batch["example_id"].tolist() == [0, 3]
    assert [example["example_id"].tolist() for example in found.alone] == [[2]]


def test_ambiguous_and_square_batches_are_widened() -> None:
    """A square one at once where outputs are split into examples, any other when forward leaves a doubt."""
    widths: list[int] = []

    def forward(batch: Batch) -> Tensor | None:
        widths.append(batch["input_ids"].shape[1])
        return torch.zeros(len(batch["input_ids"])) if widths[-1] == 6 else None

    square = collate(make_examples((4, 3, 4, 2)))
    assert finite_losses(square, forward, lambda _: True, has_rows=True).batch["input_ids"].shape == (4, 6)
    assert widths == [5, 6]


def test_nothing_finite_leaves_an_empty_batch() -> None:
    """Without another look at an example that is a batch of its own already."""
    batch = collate(make_examples((4,)))
    found = finite_losses(batch, lambda _: torch.tensor([torch.inf]), lambda _: pytest.fail("looked"), has_rows=True)
    assert (found.losses, found.nonfinite, found.alone) == (None, {0}, [])
