"""Rotary positions whose frequencies depend on the length of a sequence, each example with those of its own length.

For two types of scaling the library takes the longest sequence of a batch for all of it:

    longrope    one set of frequencies up to a length, another beyond it
    dynamic     frequencies of the sequence's very length beyond that of pre-training; it also remembers the longest yet

so that an example's loss would depend on the others in its batch, and on earlier batches.
"""

import inspect
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from dualsft.models import PreTrainedModel


def separate_frequencies(model: PreTrainedModel) -> None:
    """Have a model, in place, give each example the rotary frequencies that it has alone, in any batch.

    Examples are told apart by their positions, which begin with 0. A model of any other type of positions stays as it
    is.
    """
    scaled = [name for name, module in model.named_modules() if _depends_on_length(module)]
    for name in scaled:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, _ByLength(model.get_submodule(name)))
    if scaled and "position_ids" in inspect.signature(model.forward).parameters:
        model.register_forward_pre_hook(_with_positions, with_kwargs=True)


def has_separate_frequencies(model: PreTrainedModel) -> bool:
    """Whether `separate_frequencies` changed a model: keys in a cache do not fit those of a longer sequence."""
    return any(isinstance(module, _ByLength) for module in model.modules())


def _depends_on_length(module: nn.Module) -> bool:
    types = getattr(module, "rope_type", None)
    found = types.values() if isinstance(types, dict) else [types]
    return any(isinstance(of, str) and (of == "longrope" or "dynamic" in of) for of in found)


def _with_positions(model: nn.Module, args: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give the positions of padded rows, in which padding has position 0, where the caller gives none."""
    mask, cache = options.get("attention_mask"), options.get("past_key_values")
    if mask is None or mask.dim() != 2 or cache is not None or options.get("position_ids") is not None:
        return args, options
    return args, {**options, "position_ids": (mask.long().cumsum(1) - 1) * mask.long()}


class _ByLength(nn.Module):
    """Calls a rotary embedding once for all examples that have the same frequencies, with their positions alone."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary: Any = rotary

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines, (row, token, channel)."""
        of_layer = {} if layer_type is None else {"layer_type": layer_type}
        found: tuple[Tensor, Tensor] | None = None
        kinds = self._kinds(position_ids, layer_type)
        for kind in kinds.unique().tolist():
            own = kinds == kind
            self.rotary(x, torch.zeros_like(position_ids[..., :1]), **of_layer)  # it forgets the longest sequence yet
            parts = self.rotary(x, position_ids.where(own, 0), **of_layer)
            found = _exchanged(found, parts, own) if found else parts
        assert found is not None
        return found

    def _kinds(self, position_ids: Tensor, layer_type: str | None) -> Int[Tensor, "row token"]:
        """For each token a number that is the same where frequencies are the same."""
        rope_type = self.rotary.rope_type if layer_type is None else self.rotary.rope_type[layer_type]
        if position_ids.dim() != 2:  # an axis for each of several kinds of positions, of which none of these models is
            return torch.zeros_like(position_ids)
        if "dynamic" in rope_type:
            return _lengths(position_ids).clamp(min=self.rotary.original_max_seq_len)
        if rope_type == "longrope":
            settings = self.rotary.config.rope_parameters
            settings = settings if layer_type is None else settings[layer_type]
            return (_lengths(position_ids) > settings["original_max_position_embeddings"]).long()
        return torch.zeros_like(position_ids)


def _exchanged(found: tuple[Tensor, Tensor], parts: tuple[Tensor, Tensor], own: Tensor) -> tuple[Tensor, Tensor]:
    """The cosines and sines found so far, with those of some tokens exchanged."""
    cos, sin = (part.where(own[..., None], before) for part, before in zip(parts, found, strict=True))
    return cos, sin


def _lengths(position_ids: Int[Tensor, "row token"]) -> Int[Tensor, "row token"]:
    """For each token the length of its example: the largest position, plus one, up to where positions begin again."""
    example = (position_ids == 0).long().cumsum(1)
    longest = torch.zeros(len(example), int(example.max()) + 1, dtype=torch.int64, device=example.device)
    return longest.scatter_reduce(1, example, position_ids, "amax").gather(1, example) + 1
