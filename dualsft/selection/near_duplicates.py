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
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import UInt64

from dualsft.data.options import FormatOptions
from dualsft.data.reading import text_reader
from dualsft.data.records import Records
from dualsft.errors import UserError
from dualsft.selection.similar_places import SimilarPlaces

DUPLICATE_OF = "duplicate_of"
"""The column of ``examples.parquet`` with the example that stands in the place of a near-duplicate."""

_PERMUTATIONS, _SEED = 256, 0
_MISSED = 1e-3
_AT_ONCE = 2**12
_REMEMBERED = 2**14
"""Texts whose shingles are held for the next comparison."""


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
    if settings.threshold is None or not scores:
        return {}
    text_of = text_reader(records, options)
    ids = np.fromiter(scores, np.int64, len(scores))
    ids = ids[np.lexsort((ids, -np.fromiter(scores.values(), np.float64, len(scores))))]  # place -> example

    @lru_cache(maxsize=_REMEMBERED)
    def shingles_at(place: int) -> UInt64[np.ndarray, " shingle"]:
        return hashed_shingles(text_of(int(ids[place])), settings.ngram)

    # 1. All texts as hashes in arrays.
    index, blank = SimilarPlaces(len(ids), *bands(settings.threshold)), blank_signature()
    for place in range(len(ids)):
        shingles = hashed_shingles(text_of(int(ids[place])), settings.ngram)
        index.put(place, shingles, signature(blank, shingles).hashvalues.astype(np.uint64))
    # 2. Among the first of equal texts, those that may be alike are compared, from the highest score on.
    firsts = index.first_of_text()
    stands = np.arange(len(ids))  # place -> the place that stays for it
    staying: dict[int, list[int]] = {}  # number of a shared band -> places that stay
    for place, shared in index.buckets(np.flatnonzero(firsts == stands)):
        near = sorted({k for bucket in shared for k in staying.get(bucket, ())})
        alike = (k for k in near if jaccard(shingles_at(place), shingles_at(k)) >= settings.threshold)
        stands[place] = next(alike, place)
        if stands[place] == place:
            for bucket in shared:
                staying.setdefault(bucket, []).append(place)
    # 3. The others of equal texts go with the first.
    stands = stands[firsts]
    dropped = np.flatnonzero(stands != np.arange(len(ids)))
    return dict(zip(ids[dropped].tolist(), ids[stands[dropped]].tolist(), strict=True))


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


def blank_signature() -> Any:
    """The signature of no shingle, from which `signature` starts."""
    from datasketch import MinHash  # brings scipy, which nothing else needs

    return MinHash(_PERMUTATIONS, seed=_SEED, hashfunc=int)  # shingles are hashed already


def signature(blank: Any, shingles: UInt64[np.ndarray, " shingle"]) -> Any:
    """The MinHash of a text's shingles."""
    made = blank.copy()
    hashes = shingles & np.uint64(0xFFFFFFFF)
    for first in range(0, len(hashes), _AT_ONCE):  # a batch takes memory for all of its permutations
        made.update_batch(hashes[first : first + _AT_ONCE].tolist())
    return made


class SimilarTexts:
    """An index of texts by their shingles, which finds those at least as similar as a threshold."""

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHashLSH  # brings scipy, which nothing else needs

        self._threshold, self._blank = threshold, blank_signature()
        self._lsh = MinHashLSH(num_perm=_PERMUTATIONS, params=bands(threshold))
        self._sets: list[np.ndarray] = []

    def add(self, shingles: UInt64[np.ndarray, " shingle"]) -> None:
        """Add a text; texts are numbered from 0."""
        self._add(shingles, signature(self._blank, shingles))

    def like(self, shingles: UInt64[np.ndarray, " shingle"]) -> list[int]:
        """The numbers of the texts that are like this one."""
        return self._like(shingles, signature(self._blank, shingles))

    def _add(self, shingles: np.ndarray, signature: Any) -> None:
        self._lsh.insert(len(self._sets), signature)
        self._sets.append(shingles)

    def _like(self, shingles: np.ndarray, signature: Any) -> list[int]:
        candidates = self._lsh.query(signature)
        return sorted(k for k in candidates if jaccard(shingles, self._sets[k]) >= self._threshold)
