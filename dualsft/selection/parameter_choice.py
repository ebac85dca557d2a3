"""The parameter budget: which weights are trained, exactly as many as the budget, under any allocator."""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from dualsft.allocators import ScoredParameters, count_of
from dualsft.allocators.choice import empty_mask
from dualsft.errors import UserError, is_own
from dualsft.needs import ask
from dualsft.selection.mask import own_entries
from dualsft.selection.settings import SelectionSettings
from dualsft.sharding.collectives import all_gather
from dualsft.sharding.groups import RankGroup, own_group

Base = Callable[[], Mapping[str, Tensor]]
"""Loads the base model's weights by parameter name, if the allocator needs them."""


def parameter_budget(settings: SelectionSettings, sizes: Mapping[str, int]) -> int:
    """Compute how many weights the budget is, given the number of weights of each parameter.

    Raises:
        UserError: if that is more than may be trained, or a pattern matches no name.
    """
    available = sum(sizes[name] for name in trainable_names(settings.trainable, settings.frozen, sizes))
    return count_of("model.parameter_budget", settings.parameter_budget, available, "trainable weights")


def trainable_names(trainable: Sequence[str], frozen: Sequence[str], all_names: Iterable[str]) -> set[str]:
    """Find the parameters that may be trained; all are scored in any case.

    A pattern matches every name that contains it; in it ``*`` matches anything, ``?`` one character, and ``[0-3]`` one
    of several.

    Raises:
        UserError: if a pattern matches no name, or none is left.
    """
    names = list(all_names)
    for key, patterns in {"trainable": trainable, "frozen": frozen}.items():
        for pattern in patterns:
            if not _matching(names, [pattern]):
                raise UserError(
                    f"model.{key} has the pattern {pattern!r}, which no parameter's name contains; names are such as "
                    f"{names[0]} and {names[-1]} (a tied head goes by the embedding's)."
                )
    left = _matching(names, trainable or ["*"]) - _matching(names, frozen)
    if not left:
        raise UserError("model.trainable and model.frozen leave no parameter to train; drop a pattern.")
    return left


def _matching(names: Iterable[str], patterns: Sequence[str]) -> set[str]:
    return {name for name in names if any(fnmatchcase(name, f"*{pattern}*") for pattern in patterns)}


def chooses_together(settings: SelectionSettings) -> bool:
    """Whether several ranks can choose weights together; else one does for all."""
    allocator = settings.parameter_allocator
    return is_own(allocator) and allocator.together


def choose_parameters(
    settings: SelectionSettings, scores: Mapping[str, Tensor], base: Base, group: RankGroup | None = None
) -> dict[str, Tensor]:
    """Choose weights by their scores φ_j: parameter name -> bool, of the shape of the parameter and its scores.

    Args:
        settings: The allocator, its budget, and which weights may be trained.
        scores: Parameter name -> φ_j, float32.
        base: Loads the base model's weights, if the allocator needs them.
        group: Ranks that choose together: each calls this, and has the masks of its own parts alone.

    Raises:
        UserError: if the budget cannot be met, or the allocator violates it or modifies the scores.
    """
    allocator = settings.parameter_allocator
    budget = parameter_budget(settings, {name: score.numel() for name, score in scores.items()})
    names = trainable_names(settings.trainable, settings.frozen, scores)
    offered = {name: score for name, score in scores.items() if name in names}
    weights = base() if "weight" in allocator.needs else None
    watched = {} if is_own(allocator) else offered  # two sweeps over the scores take as long as to choose
    before = {name: checksum(score) for name, score in watched.items()}
    chosen = ask(allocator, "allocate", ScoredParameters(offered, weights, group), budget)
    if any(before[name] != checksum(score) for name, score in watched.items()):
        raise UserError(f"{type(allocator).__name__} modified the scores in place; mend it to work on a copy.")
    check_mask(type(allocator).__name__, chosen, offered, budget, group)
    return {name: chosen[name] if name in names else empty_mask(score.shape) for name, score in scores.items()}


def all_that_may_be_chosen(settings: SelectionSettings, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Choose all weights that may be trained, without scores: parameter name -> bool, of its shape."""
    names = trainable_names(settings.trainable, settings.frozen, shapes)
    return {name: torch.full(shape, name in names) for name, shape in shapes.items()}


def checksum(score: Tensor) -> int:
    """Compute a checksum (CRC-32) of a float32 tensor's bytes, which shows whether it was modified."""
    return zlib.crc32(score.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def check_mask(
    allocator: str, chosen: object, scores: Mapping[str, Tensor], budget: int, group: RankGroup | None = None
) -> None:
    """Check that a parameter allocator returned a mask for each parameter, with as many weights as the budget."""
    if not isinstance(chosen, Mapping):
        raise UserError(f"{allocator} gave back a {type(chosen).__name__}, not a mapping of names to masks; mend it.")
    if strange := [name for name in chosen if name not in scores] or [name for name in scores if name not in chosen]:
        more = "gave a mask for" if strange[0] in chosen else "gave no mask for"
        raise UserError(f"{allocator} {more} {strange[0]!r}; give one for each parameter in the scores, and no other.")
    for name, score in scores.items():
        if problem := _mask_problem(chosen[name], score):
            raise UserError(f"{allocator} gave {problem} for {name}, where a bool tensor of its shape is due; mend it.")
    own = sum(int(own_entries(chosen[name], group).count_nonzero()) for name in scores)
    count = sum(all_gather(own, group or own_group()))
    if count != budget:
        raise UserError(f"{allocator} chose {count:,} weights where {budget:,} were due; mend the allocator.")


def _mask_problem(mask: object, score: Tensor) -> str:
    """The problem of a mask; empty if there is none."""
    if not isinstance(mask, Tensor):
        return f"a {type(mask).__name__}"
    if mask.dtype != torch.bool or mask.layout != torch.strided or mask.device != score.device:
        return f"a tensor of {mask.dtype} ({mask.layout}, on {mask.device})"
    return "" if mask.shape == score.shape else f"a mask of shape {list(mask.shape)}, not {list(score.shape)},"
