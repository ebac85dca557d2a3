from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dualsft.errors import UserError
from dualsft.selection.data_choice import integers
from dualsft.selection.parameter_choice import check_mask, checksum

SCORES = {"a": torch.randn(2, 3), "b": torch.randn(4), "c": torch.tensor(1.0)}
NONE = {name: torch.zeros_like(score, dtype=torch.bool) for name, score in SCORES.items()}
GOOD = {**NONE, "b": torch.tensor([True, False, True, False])}


def test_a_mask_of_the_right_count_and_shapes_is_taken() -> None:
    """Whatever order the names come in."""
    check_mask("Mine", GOOD, SCORES, 2)
    check_mask("Mine", dict(reversed(GOOD.items())), SCORES, 2)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (None, "Mine gave back a NoneType, not a mapping of names to masks"),
        ([*GOOD.values()], "Mine gave back a list, not a mapping"),
        ({**GOOD, "d": GOOD["b"]}, "Mine gave a mask for 'd'; give one for each parameter"),
        (dict([*GOOD.items(), (3, GOOD["b"])]), "Mine gave a mask for 3; give one for each parameter"),
        ({"a": NONE["a"], "b": GOOD["b"]}, "Mine gave no mask for 'c'; give one for each parameter"),
        ({**GOOD, "a": NONE["a"].float() + 0.3}, r"a tensor of torch\.float32 .* for a, where a bool tensor"),
        ({**GOOD, "a": NONE["a"].long()}, r"a tensor of torch\.int64 .* for a, where"),
        ({**GOOD, "a": NONE["a"].to_sparse()}, r"torch\.sparse_coo, on cpu\) for a, where"),
        ({**GOOD, "a": NONE["a"].to("meta")}, r"on meta\) for a, where"),
        ({**GOOD, "a": NONE["a"].tolist()}, "a list for a, where"),
        ({**GOOD, "a": NONE["a"].t()}, r"a mask of shape \[3, 2\], not \[2, 3\], for a, where"),
        (NONE, "Mine chose 0 weights where 2 were due"),
        ({**GOOD, "c": torch.tensor(True)}, "Mine chose 3 weights where 2 were due"),
    ],
)
def test_anything_else_is_refused(chosen: Any, message: str) -> None:
    """By the allocator's name, with the first parameter at fault and what it gave."""
    with pytest.raises(UserError, match=message):
        check_mask("Mine", chosen, SCORES, 2)


def generated() -> Iterator[int]:
    """Ids one by one."""
    yield from (3, 1)


@pytest.mark.parametrize(
    "chosen", [torch.tensor([3, 1]), torch.tensor([3, 1], dtype=torch.int32), [3, 1], (3, 1), generated()]
)
def test_ids_may_come_as_they_like(chosen: Any) -> None:
    """A tensor of integers, or any iterable of them, in the order in which they came."""
    assert integers("Mine", chosen) == [3, 1]


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        (torch.tensor([3.7, 1.0]), r"a tensor of torch\.float32 and shape \[2\]"),
        (torch.tensor([True, False]), r"a tensor of torch\.bool and shape \[2\]"),
        (torch.tensor([[3], [1]]), r"a tensor of torch\.int64 and shape \[2, 1\]"),
        (torch.tensor(3), r"a tensor of torch\.int64 and shape \[\]"),
        ([3, 1.0], "a list that holds more than integers"),
        ([True], "a list that holds more than integers"),
        ("31", "a str"),
        ({3: 1}, "a dict"),
        (None, "a NoneType"),
        (3, "a int"),
    ],
)
def test_what_is_no_ids_is_refused(chosen: Any, told: str) -> None:
    """Nothing is rounded or guessed."""
    with pytest.raises(UserError, match=f"^Mine gave back {told}, where a tensor of example ids is due"):
        integers("Mine", chosen)


def changes(score: Tensor) -> Iterator[Tensor]:
    """Copies in which something is different."""
    for place in (0, len(score) // 2, -1):
        other = score.clone()
        other[place] = torch.nextafter(other[place], torch.tensor(9.0))
        yield other
    yield score.sort().values
    yield -score
    yield score.roll(1)


@pytest.mark.parametrize("size", [3, 5000])
def test_a_checksum_tells_what_was_modified(size: int) -> None:
    """The same for the same bits, NaN included; another for one changed bit, another order, or another sign."""
    score = torch.randn(size, generator=torch.Generator().manual_seed(size))
    assert checksum(score) == checksum(score.clone())
    assert all(checksum(score) != checksum(other) for other in changes(score))
    score[1] = torch.nan
    assert checksum(score) == checksum(score.clone())


@pytest.mark.parametrize("score", [torch.tensor(1.0), torch.ones(0, 2), torch.arange(6.0).view(2, 3).t()])
def test_a_checksum_is_taken_of_any_shape(score: Tensor) -> None:
    """A number, an empty tensor and a view too."""
    assert checksum(score) == checksum(score.clone(memory_format=torch.contiguous_format))
