"""Which records of a source are taken where it has a share or a cap: the same ones in every run and on every system."""

import hashlib

import numpy as np

from dualsft.data.sources import SourceOptions


def taken_rows(source: SourceOptions, count: int) -> list[int]:
    """The rows of a source of this many records that are taken, ascending.

    Rows are ranked by a hash of the source's seed and their number, and the first of the ranking are taken: a larger
    cap keeps what a smaller one takes.

    Args:
        source: The source; its share is rounded to a number of records, of which there is at least one.
        count: How many records it has.
    """
    if (number := taken_count(source, count)) == count:
        return list(range(count))

    def digest(row: int) -> bytes:
        return hashlib.blake2b(f"{source.seed} {row}".encode(), digest_size=16).digest()

    high, low = np.frombuffer(b"".join(map(digest, range(count))), dtype=">u8").reshape(-1, 2).T
    rows: list[int] = np.sort(np.lexsort((low, high))[:number]).tolist()
    return rows


def taken_count(source: SourceOptions, count: int) -> int:
    """How many of this many records of a source are taken."""
    number = count if source.share is None else max(round(source.share * count), min(count, 1))
    return number if source.cap is None else min(number, source.cap)


def told(source: SourceOptions, label: str, count: int) -> str:
    """A sentence on what is taken of a source that is sampled, and what is left out."""
    number = taken_count(source, count)
    limits = [f"{name} {value}" for name, value in (("share", source.share), ("cap", source.cap)) if value is not None]
    return (
        f"{label}: {number:,} of its {count:,} records are taken at random ({', '.join(limits)}, seed {source.seed}), "
        f"{count - number:,} are left out."
    )
