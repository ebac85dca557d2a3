"""Masks as bits: eight weights to a byte, little-endian over the flat parameter."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dualsft.errors import UserError


def pack_bits(mask: Bool[Tensor, "..."]) -> UInt8[Tensor, " byte"]:
    """Entry j of the flat mask becomes bit j % 8 (least significant first) of byte j // 8."""
    return torch.from_numpy(np.packbits(mask.cpu().flatten().numpy(), bitorder="little"))


def unpack_bits(packed: UInt8[Tensor, " byte"], shape: tuple[int, ...]) -> Bool[Tensor, "..."]:
    """The inverse of `pack_bits` for a parameter of this shape.

    Raises:
        ValueError: if the bits are of another number.
    """
    count = int(np.prod(shape, dtype=np.int64))
    if len(packed) != -(-count // 8):
        raise ValueError(f"{len(packed)} bytes hold no {count} bits")
    bits = np.unpackbits(packed.numpy(), count=count, bitorder="little")
    return torch.from_numpy(bits.view(np.bool_)).view(shape)


def write_masks(path: Path, masks: Mapping[str, Tensor]) -> None:
    """Write masks, by parameter name, into a file."""
    packed, shapes = {}, {}
    for name, chosen in sorted(masks.items()):
        packed[name], shapes[name] = pack_bits(chosen), list(chosen.shape)
    # one entry: safetensors writes several in an order that changes from run to run
    save_file(packed, path, metadata={"shapes": json.dumps(shapes)})


class StoredMasks(Mapping[str, Tensor]):
    """The masks in a file, by parameter name: each is unpacked, to a byte a weight, when it is asked for.

    Args:
        path: A ``mask.safetensors``.

    Raises:
        UserError: if the file is damaged, here or when a mask is asked for.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._stored = safe_open(path, framework="pt")
            self._shapes: dict[str, list[int]] = json.loads(self._stored.metadata()["shapes"])
        except (SafetensorError, OSError, LookupError, TypeError, ValueError) as error:
            raise self._damaged(error) from error

    def __getitem__(self, name: str) -> Bool[Tensor, "..."]:
        shape = tuple(self._shapes[name])
        try:
            return unpack_bits(self._stored.get_tensor(name), shape)
        except (SafetensorError, TypeError, ValueError) as error:
            raise self._damaged(error) from error

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._shapes))

    def __len__(self) -> int:
        return len(self._shapes)

    def _damaged(self, error: Exception) -> UserError:
        return UserError(f"{self._path} is damaged ({error}); make the selection again.")
