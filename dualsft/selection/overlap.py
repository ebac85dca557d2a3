"""What a user should know of the data before work starts: files left out, and rows that are in two sets."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import numpy as np
from jaxtyping import UInt64

from dualsft.data.examples import Examples
from dualsft.data.folders import listed
from dualsft.data.module import InstructionDataModule
from dualsft.data.options import TRAIN, FormatOptions
from dualsft.data.reading import text_reader
from dualsft.runs.progress import say
from dualsft.selection.near_duplicates import SimilarTexts, hashed_ngrams, hashed_shingles, words_of
from dualsft.sharding.collectives import is_rank_zero

_THRESHOLD, _NGRAM = 0.8, 3


def tell_of_data(data: InstructionDataModule) -> None:
    """Say what `remarks` finds in the data that have been read."""
    if is_rank_zero():
        for remark in remarks(data.encoded, data.options):
            say(remark)


def remarks(sets: Mapping[str, Examples], options: FormatOptions) -> Iterator[str]:
    """One sentence for each set with files left out, each two sets of the same rows, and each that the pool overlaps.

    What the examples themselves remark comes first, each sentence once.

    Args:
        sets: Key of the option that gives a set -> its examples.
        options: How records are read.
    """
    yield from dict.fromkeys(remark for examples in sets.values() for remark in examples.remarks)
    for key, examples in sets.items():
        if names := examples.records.left_out:
            yield f"{key}: {listed(names)} in its folder {'is' if len(names) == 1 else 'are'} not read."
    for one, other in combinations(sets, 2):
        if sets[one].records.fingerprint == sets[other].records.fingerprint:
            yield f"{one} and {other} hold the same {len(sets[one]):,} rows."
        elif TRAIN in (one, other):
            key = other if one == TRAIN else one
            same, similar = shared_rows(sets[TRAIN], sets[key], options)
            if same or similar:
                yield (
                    f"{same + similar:,} of the {len(sets[key]):,} rows of {key} are in {TRAIN}: {same:,} as they "
                    f"stand, {similar:,} nearly (Jaccard similarity of word {_NGRAM}-grams of at least {_THRESHOLD})."
                )


def shared_rows(pool: Examples, target: Examples, options: FormatOptions) -> tuple[int, int]:
    """Count the target's rows whose text is a row's of the pool, and those that are only similar to one.

    Examples without labels do not count. A text of the pool is compared with others only if enough of its n-grams occur
    anywhere in the target.
    """
    texts = dict(_texts(target, options))
    ids, shingles = list(texts), [hashed_shingles(text, _NGRAM) for text in texts.values()]
    known = np.unique(np.concatenate(shingles)) if shingles else np.zeros(1, np.uint64)
    index: SimilarTexts | None = None
    same, similar = set[str](), set[int]()
    for _, text in _texts(pool, options):
        if (own := _if_known(words_of(text), known)) is None:
            continue
        if index is None:
            index = SimilarTexts(_THRESHOLD)
            for of in shingles:
                index.add(of)
        same.add(text)
        similar |= {ids[k] for k in index.like(own)}
    exact = {i for i, text in texts.items() if text in same}
    return len(exact), len(similar - exact)


def _texts(examples: Examples, options: FormatOptions) -> Iterator[tuple[int, str]]:
    text = text_reader(examples.records, options)
    return ((i, text(i)) for i in examples.ok_ids())


def _if_known(words: Sequence[str], known: UInt64[np.ndarray, " known"]) -> UInt64[np.ndarray, " shingle"] | None:
    """A text's hashed n-grams; None if too many of them are not known for a text of known ones alone to be like it.

    Most texts share nothing with the target, and their first n-grams say so.
    """
    places = max(1, len(words) - _NGRAM + 1)
    most = int((1 - _THRESHOLD) * places) + 1
    for length in (most + _NGRAM - 1, len(words)):
        own = hashed_ngrams(words[:length], _NGRAM)
        found = known[np.minimum(np.searchsorted(known, own), len(known) - 1)] == own
        if len(own) - found.sum() >= most:
            return None
    return own
