"""Which of very many texts may be alike, in arrays: 4 bytes for each band of a text's signature, and 16 for the text.

Texts are put in order, and have places from 0. Two may be alike if their signatures agree in all entries of a band, see
`dualsft.selection.near_duplicates`; a band is kept as a 32-bit hash, so that now and then two others share one.
"""

import hashlib
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int, UInt64

Places = Int[np.ndarray, " place"]


class SimilarPlaces:
    """The texts of so many places, by signature and by identity.

    Args:
        count: How many places there are.
        bands: Bands of a signature.
        rows: Entries of a band.
    """

    def __init__(self, count: int, bands: int, rows: int) -> None:
        self._shape = bands, rows
        self._keys = np.zeros((bands, count), np.uint32)
        self._texts = np.zeros(count, "V16")
        draw = np.random.default_rng(0)
        # odd multipliers: the upper half of a sum of products is a hash in which all entries take part
        self._factors = draw.integers(0, 2**63, (bands, rows), np.uint64) * np.uint64(2) + np.uint64(1)

    def put(
        self, place: int, shingles: UInt64[np.ndarray, " shingle"], signature: UInt64[np.ndarray, " entry"]
    ) -> None:
        """Put a text, given as its shingles, and their signature."""
        bands, rows = self._shape
        entries = signature[: bands * rows].reshape(bands, rows)
        self._keys[:, place] = (entries * self._factors).sum(1, dtype=np.uint64) >> np.uint64(32)
        self._texts[place] = np.void(hashlib.blake2b(shingles.tobytes(), digest_size=16).digest())

    def first_of_text(self) -> Places:
        """For each place the first one with the same shingles; its own if it is the first."""
        _, firsts, groups = np.unique(self._texts, return_index=True, return_inverse=True)
        return firsts[groups.reshape(-1)]

    def buckets(self, among: Places) -> Iterator[tuple[int, list[int]]]:
        """Each of some places, ascending, that shares a band with another of them, with the numbers of those bands.

        A number is that of one band with one key.
        """
        of_places, numbers, used = [], [], 0
        for keys in self._keys:
            own = keys[among]
            order = np.argsort(own, kind="stable")
            new = np.append(True, own[order][1:] != own[order][:-1])[: len(own)]
            run = np.cumsum(new) - 1
            shared = np.bincount(run)[run] > 1
            of_places.append(order[shared].astype(np.int32))
            numbers.append((run[shared] + used).astype(np.int64))
            used += int(run[-1]) + 1 if len(run) else 0
        places, buckets = np.concatenate(of_places), np.concatenate(numbers)
        order = np.argsort(places, kind="stable")
        ends = np.append(np.flatnonzero(np.diff(places[order])) + 1, len(order))
        first = 0
        for end in ends if len(order) else ():
            part = order[first:end]
            yield int(among[places[part[0]]]), buckets[part].tolist()
            first = end
