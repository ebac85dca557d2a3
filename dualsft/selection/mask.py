"""Masks as bits: eight weights to a byte, little-endian over the flat parameter."""

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from torch import Tensor


def pack_bits(mask: Bool[Tensor, "..."]) -> UInt8[Tensor, " byte"]:
    """Entry j of the flat mask becomes bit j % 8 (least significant first) of byte j // 8."""
    return torch.from_numpy(np.packbits(mask.cpu().flatten().numpy(), bitorder="little"))


def unpack_bits(packed: UInt8[Tensor, " byte"], shape: tuple[int, ...]) -> Bool[Tensor, "..."]:
    """The inverse of `pack_bits` for a parameter of this shape."""
    count = int(np.prod(shape, dtype=np.int64))
    bits = np.unpackbits(packed.numpy(), count=count, bitorder="little")
    return torch.from_numpy(bits.view(np.bool_)).view(shape)
