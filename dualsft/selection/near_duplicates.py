"""Drops near-duplicates before examples are chosen: among similar texts the best one stays.

    J(A, B) = |A ∩ B| / |A ∪ B|

with A and B the sets of n-grams (shingles) of two texts' words. A word is a run of letters, digits and underscores,
whatever their case, or any other mark by itself, as 3 + 4 is not 3 - 4; in a script without spaces it is all up to the
next mark. Candidates come from MinHash signatures: two signatures agree in an entry with probability J, and texts are
compared if all r entries of at least one of b bands agree, which happens with probability

    1 - (1 - J^r)^b.

Those that are compared are judged by J itself, over 64-bit hashes of the shingles. So a text is never dropped for one
below the threshold; a pair at or above it is missed with at most one minus the probability above, which is at most 0.1%
at thresholds from 0.03 up. Low thresholds are slow, as they compare many pairs.
Source: Broder, On the Resemblance and Containment of Documents (1997).
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt64

from dualsft.data.options import FormatOptions
from dualsft.data.reading import text_reader
from dualsft.data.records import Records
from dualsft.errors import UserError

DUPLICATE_OF = "duplicate_of"
"""The column of ``examples.parquet`` with the example that stands in the place of a near-duplicate."""

_PERMUTATIONS, _SEED = 256, 0
_MISSED = 1e-3
_AT_ONCE = 2**12


@dataclass(frozen=True)
class NearDuplicates:
    """Texts that say the same as one of a higher score are not selected.

    Args:
        threshold: Jaccard similarity of two texts' word n-grams from which on only the one with the higher score may be
            selected: 1.0 for texts of the same n-grams, null to keep all.
        ngram: Words and marks to an n-gram; a shorter text is one of all its words.
    """

    threshold: float | None = None
    ngram: int = 3

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise UserError(
                f"model.near_duplicates.threshold is {self.threshold}; give a similarity above 0 and up to 1, or null "
                "to keep all."
            )
        if self.ngram < 1:
            raise UserError(f"model.near_duplicates.ngram is {self.ngram}; give a number of words of at least 1.")


def collapse(
    settings: NearDuplicates, scores: Mapping[int, float], records: Records, options: FormatOptions
) -> dict[int, int]:
    """Each example that is dropped -> the one that stays in its place.

    From the highest score to the lowest (of equal ones the earlier row first), an example stays unless it is similar
    to one that stays already: the best of these stands in its place. Equal texts always collapse.

    Args:
        settings: From which similarity on two texts are alike.
        scores: Row number of each example -> φ_i.
        records: The pool.
        options: How its records are read; only the columns that the format reads count.
    """
    if settings.threshold is None:
        return {}
    text_of = text_reader(records, options)
    stands_for: dict[bytes, int] = {}  # shingles -> the example that stays
    kept: list[int] = []
    twins, index = {}, SimilarTexts(settings.threshold)
    for i in sorted(scores, key=lambda i: (-scores[i], i)):
        shingles = hashed_shingles(text_of(i), settings.ngram)
        text = shingles.tobytes()
        if text in stands_for:
            twins[i] = stands_for[text]
        elif (place := index.add_unless_like_another(shingles)) is None:
            kept.append(i)
            stands_for[text] = i
        else:
            twins[i] = stands_for[text] = kept[place]
    return twins


def duplicate_column(ids: Iterable[int], duplicate_of: Mapping[int, int]) -> dict[str, list[int | None]]:
    """The column ``duplicate_of``, by its name; nothing where no example is one."""
    return {DUPLICATE_OF: [duplicate_of.get(i) for i in ids]} if duplicate_of else {}


def hashed_shingles(text: str, ngram: int) -> UInt64[np.ndarray, " shingle"]:
    """A 64-bit hash of each different n-gram of words, ascending; a blank text is one shingle as it stands."""
    return hashed_ngrams(words_of(text), ngram)


def words_of(text: str) -> list[str]:
    """The words and marks of a text; a blank text is one word as it stands."""
    return re.findall(r"\w+|[^\w\s]", text.casefold()) or [text]


def hashed_ngrams(words: Sequence[str], ngram: int) -> UInt64[np.ndarray, " shingle"]:
    """A 64-bit hash of each different n-gram, ascending; fewer words are one n-gram."""
    starts = range(max(1, len(words) - ngram + 1))
    shingles = {" ".join(words[k : k + ngram]).encode(errors="surrogatepass") for k in starts}
    digests = b"".join(hashlib.blake2b(shingle, digest_size=8).digest() for shingle in shingles)
    return np.sort(np.frombuffer(digests, dtype="<u8").astype(np.uint64))


def jaccard(one: UInt64[np.ndarray, " one"], other: UInt64[np.ndarray, " other"]) -> float:
    """|A ∩ B| / |A ∪ B| of two sets of hashes."""
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common)


def bands(threshold: float) -> tuple[int, int]:
    """Bands b and rows r: the most rows, and so the fewest candidates, with at most 0.1% of pairs at J missed."""
    for rows in range(_PERMUTATIONS // 2, 1, -1):
        count = _PERMUTATIONS // rows
        if (1 - threshold**rows) ** count <= _MISSED:
            return count, rows
    return _PERMUTATIONS, 1


class SimilarTexts:
    """An index of texts by their shingles, which finds those at least as similar as a threshold."""

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHash, MinHashLSH  # brings scipy, which nothing else needs

        self._threshold = threshold
        self._blank = MinHash(_PERMUTATIONS, seed=_SEED, hashfunc=int)  # shingles are hashed already
        self._lsh = MinHashLSH(num_perm=_PERMUTATIONS, params=bands(threshold))
        self._sets: list[np.ndarray] = []

    def add(self, shingles: UInt64[np.ndarray, " shingle"]) -> None:
        """Add a text; texts are numbered from 0."""
        self._add(shingles, self._signature(shingles))

    def like(self, shingles: UInt64[np.ndarray, " shingle"]) -> list[int]:
        """The numbers of the texts that are like this one."""
        return self._like(shingles, self._signature(shingles))

    def add_unless_like_another(self, shingles: UInt64[np.ndarray, " shingle"]) -> int | None:
        """Add a text, and return None, unless one that was added before is like it; return the first one's number."""
        signature = self._signature(shingles)
        if found := self._like(shingles, signature):
            return found[0]
        self._add(shingles, signature)
        return None

    def _signature(self, shingles: UInt64[np.ndarray, " shingle"]) -> Any:
        signature = self._blank.copy()
        hashes = shingles & np.uint64(0xFFFFFFFF)
        for first in range(0, len(hashes), _AT_ONCE):  # a batch takes memory for all of its permutations
            signature.update_batch(hashes[first : first + _AT_ONCE].tolist())
        return signature

    def _add(self, shingles: np.ndarray, signature: Any) -> None:
        self._lsh.insert(len(self._sets), signature)
        self._sets.append(shingles)

    def _like(self, shingles: np.ndarray, signature: Any) -> list[int]:
        candidates = self._lsh.query(signature)
        return sorted(k for k in candidates if jaccard(shingles, self._sets[k]) >= self._threshold)
