"""A uniform sample without replacement: positions are drawn one after another, and those that came before are skipped.

More than half are chosen by drawing what is left out, so that at most every second draw comes to nothing. Beside the
mask of one byte an entry, no memory goes by the number of entries.
"""

import torch
from torch import Tensor

_AT_ONCE = 1 << 24


def random_entries(size: int, count: int, generator: torch.Generator) -> Tensor:
    """Exactly ``count`` of ``size`` entries, every set of them equally likely; bool, (size)."""
    if count > size // 2:
        return ~random_entries(size, size - count, generator)
    chosen = torch.zeros(size, dtype=torch.bool)
    while count:
        # torch's own draws below a large size are remainders of 32 bits, which favour the first by up to 6%
        drawn = torch.randint(2**63 - 1, (min(count, _AT_ONCE),), generator=generator) % size
        fresh = drawn[~chosen[drawn]].unique()
        chosen[fresh] = True
        count -= len(fresh)
    return chosen
