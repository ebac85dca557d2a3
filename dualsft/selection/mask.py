"""Masks as bits: eight weights to a byte, little-endian over the flat parameter."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dualsft.allocators.choice import own_part
from dualsft.errors import UserError
from dualsft.models.lazy import LazyTensors
from dualsft.sharding.collectives import on_rank_zero
from dualsft.sharding.groups import RankGroup
from dualsft.sharding.vectors import gather_vectors


def pack_bits(mask: Bool[Tensor, "..."]) -> UInt8[Tensor, " byte"]:
    """Entry j of the flat mask becomes bit j % 8 (least significant first) of byte j // 8."""
    return torch.from_numpy(np.packbits(mask.cpu().flatten().numpy(), bitorder="little"))


def unpack_bits(packed: UInt8[Tensor, " byte"], shape: tuple[int, ...]) -> Bool[Tensor, "..."]:
    """The inverse of `pack_bits` for a parameter of this shape; a ValueError if that has another number of bits."""
    count = int(np.prod(shape, dtype=np.int64))
    if len(packed) != -(-count // 8):
        raise ValueError(f"{len(packed)} bytes hold no {count} bits")
    bits = np.unpackbits(packed.numpy(), count=count, bitorder="little")
    return torch.from_numpy(bits.view(np.bool_)).view(shape)


def write_masks(path: Path, masks: Mapping[str, Tensor], group: RankGroup | None = None) -> None:
    """Write masks, by parameter name, into a file.

    Args:
        path: The file.
        masks: Parameter name -> bool.
        group: Ranks that have chosen together: each calls this with its own parts of the masks, and rank zero writes.
    """
    names = sorted(masks)
    shapes = {name: list(masks[name].shape) for name in names}
    packed = [pack_bits(own_entries(masks[name], group)) for name in names]
    if group:
        packed = gather_vectors(packed, group)

    def write() -> None:
        # one entry: safetensors writes several in an order that changes from run to run
        save_file(dict(zip(names, packed, strict=True)), path, metadata={"shapes": json.dumps(shapes)})

    on_rank_zero(write) if group else write()


def own_entries(mask: Bool[Tensor, "..."], group: RankGroup | None) -> Bool[Tensor, " entry"]:
    """The flat entries of a mask that this rank has chosen, where several have chosen together; else all."""
    return mask.flatten() if group is None else mask.flatten()[own_part(mask.numel(), group)]


def stored_masks(path: Path) -> LazyTensors:
    """The masks in a ``mask.safetensors``, by parameter name: each is unpacked, to a byte a weight, when it is read.

    Raises:
        UserError: if the file is damaged, here or when a mask is read.
    """
    with refusing_damage(path):
        stored = safe_open(path, framework="pt")
        shapes: dict[str, list[int]] = json.loads(stored.metadata()["shapes"])
        names = sorted(shapes)

    def read(name: str) -> Tensor:
        with refusing_damage(path):
            return unpack_bits(stored.get_tensor(name), tuple(shapes[name]))

    return LazyTensors(names, read)


@contextmanager
def refusing_damage(path: Path) -> Iterator[None]:
    """Turn the exceptions of reading a damaged file into a sentence."""
    try:
        yield
    except (SafetensorError, OSError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); make the selection again.") from error
