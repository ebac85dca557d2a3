"""Candidates for likeness, in arrays."""

import numpy as np
import pytest

from dualsft.selection.near_duplicates import blank_signature, hashed_shingles, signature
from dualsft.selection.similar_places import SimilarPlaces

BANDS, ROWS = 30, 4
TEXTS = ["a b c d e f", "x y z", "a b c d e g", "u v w", "a b c d e f", "x y z u v w"]


@pytest.fixture
def index() -> SimilarPlaces:
    """The texts, at places in their order."""
    found, blank = SimilarPlaces(len(TEXTS), BANDS, ROWS), blank_signature()
    for place, text in enumerate(TEXTS):
        shingles = hashed_shingles(text, 1)
        found.put(place, shingles, signature(blank, shingles).hashvalues.astype(np.uint64))
    return found


def test_equal_texts_have_the_place_of_the_first(index: SimilarPlaces) -> None:
    """And every other text its own."""
    assert index.first_of_text().tolist() == [0, 1, 2, 3, 0, 5]


def test_places_share_bands_as_their_signatures_do(index: SimilarPlaces) -> None:
    """Two places have a number in common exactly where all entries of a band agree; others are not there."""
    signatures = [signature(blank_signature(), hashed_shingles(text, 1)).hashvalues for text in TEXTS]
    bands = [of[: BANDS * ROWS].reshape(BANDS, ROWS) for of in signatures]
    places = np.array([0, 1, 2, 3, 5])
    found = dict(index.buckets(places))
    assert list(found) == sorted(found)
    for i in places.tolist():
        others = [k for k in places.tolist() if k != i]
        common = {k: int((bands[i] == bands[k]).all(1).sum()) for k in others}
        assert (i in found) == any(common.values())
        for k in others:
            assert len({*found.get(i, ())} & {*found.get(k, ())}) == common[k]
    assert 2 in found


def test_places_without_company_have_no_bands(index: SimilarPlaces) -> None:
    """Nor do none at all."""
    assert list(index.buckets(np.array([1, 3]))) == []
    assert list(index.buckets(np.zeros(0, np.int64))) == []
