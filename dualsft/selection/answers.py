"""What an allocator gives back, looked at before anything is made of it: it may be anybody's."""

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Int
from torch import Tensor

from dualsft.errors import UserError

_COMPONENTS = 1021


def checksum(score: Tensor) -> Int[Tensor, " component"]:
    """Sums over a float32 tensor's bits, a prime number of places apart: to see whether it was modified."""
    bits = score.flatten().view(torch.int32)
    whole = len(bits) // _COMPONENTS * _COMPONENTS
    sums = bits[:whole].view(-1, _COMPONENTS).sum(0)
    sums[: len(bits) - whole] += bits[whole:]
    return sums


def check_mask(allocator: str, chosen: object, scores: Mapping[str, Tensor], budget: int) -> None:
    """See that a parameter allocator gave a mask for each parameter, and chose as many weights as were due.

    Raises:
        UserError: naming the allocator, and the first parameter that is at fault.
    """
    if not isinstance(chosen, Mapping):
        raise UserError(f"{allocator} gave back a {type(chosen).__name__}, not a mapping of names to masks; mend it.")
    if strange := [name for name in chosen if name not in scores] or [name for name in scores if name not in chosen]:
        more = "gave a mask for" if strange[0] in chosen else "gave no mask for"
        raise UserError(f"{allocator} {more} {strange[0]!r}; give one for each parameter in the scores, and no other.")
    for name, score in scores.items():
        if problem := _mask_problem(chosen[name], score):
            raise UserError(f"{allocator} gave {problem} for {name}, where a bool tensor of its shape is due; mend it.")
    count = sum(int(chosen[name].sum()) for name in scores)
    if count != budget:
        raise UserError(f"{allocator} chose {count:,} weights where {budget:,} were due; mend the allocator.")


def _mask_problem(mask: object, score: Tensor) -> str:
    if not isinstance(mask, Tensor):
        return f"a {type(mask).__name__}"
    if mask.dtype != torch.bool or mask.layout != torch.strided or mask.device != score.device:
        return f"a tensor of {mask.dtype} ({mask.layout}, on {mask.device})"
    return "" if mask.shape == score.shape else f"a mask of shape {list(mask.shape)}, not {list(score.shape)},"


def integers(allocator: str, chosen: object) -> list[int]:
    """The ids that a data allocator gave back, a one-dimensional tensor of integers or any iterable of them.

    Raises:
        UserError: naming the allocator and what it gave.
    """
    if isinstance(chosen, Tensor):
        if chosen.dim() == 1 and not (chosen.is_floating_point() or chosen.is_complex() or chosen.dtype == torch.bool):
            return [int(i) for i in chosen.tolist()]
        told = f"a tensor of {chosen.dtype} and shape {list(chosen.shape)}"
    elif isinstance(chosen, Iterable) and not isinstance(chosen, (str, bytes, Mapping)):
        found = list(chosen)
        if all(hasattr(i, "__index__") and not isinstance(i, bool) for i in found):
            return [int(i) for i in found]
        told = f"a {type(chosen).__name__} that holds more than integers"
    else:
        told = f"a {type(chosen).__name__}"
    raise UserError(f"{allocator} gave back {told}, where a tensor of example ids is due, (chosen); mend it.")
