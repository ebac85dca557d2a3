import json
import random
import re
from collections.abc import Mapping, Sequence

import pytest

from dualsft.data.files import SourceLine
from dualsft.data.options import FormatOptions
from dualsft.data.records import Records, build_records
from dualsft.errors import UserError
from dualsft.selection.near_duplicates import NearDuplicates, bands, collapse, hashed_shingles, jaccard


def pool(texts: Sequence[str]) -> Records:
    """Records whose first word is the prompt, with a bookkeeping column that would make all of them differ."""
    rows = [
        {"id": f"row {k}", "prompt": t.partition(" ")[0], "response": t.partition(" ")[2]} for k, t in enumerate(texts)
    ]
    return build_records([SourceLine(json.dumps(row), "pool.jsonl", k) for k, row in enumerate(rows, start=1)])


def stay(
    texts: Sequence[str], threshold: float | None, ngram: int = 3, scores: Mapping[int, float] | None = None
) -> list[int]:
    """The rows that stay; scores fall from row to row if not given."""
    ids = range(len(texts))
    settings = NearDuplicates(threshold, ngram)
    dropped = collapse(settings, scores or {i: -float(i) for i in ids}, pool(texts), FormatOptions())
    return [i for i in ids if i not in dropped]


def shingles(text: str, n: int) -> set[tuple[str, ...]]:
    """The word n-grams themselves."""
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    return {tuple(words[k : k + n]) for k in range(len(words) - n + 1)} or {tuple(words)}


def similarity(one: set[tuple[str, ...]], other: set[tuple[str, ...]]) -> float:
    """|A ∩ B| / |A ∪ B|."""
    return len(one & other) / len(one | other)


def reference(texts: Sequence[str], threshold: float, n: int, scores: Mapping[int, float]) -> dict[int, set[int]]:
    """From the highest score down, each text compared with all that stay: those dropped -> those that are like them."""
    sets = [shingles(text, n) for text in texts]
    kept: list[int] = []
    dropped = {}
    for i in sorted(range(len(texts)), key=lambda i: (-scores[i], i)):
        if alike := {k for k in kept if similarity(sets[i], sets[k]) >= threshold}:
            dropped[i] = alike
        else:
            kept.append(i)
    return dropped


def mutated_texts(seed: int) -> tuple[list[str], dict[int, float]]:
    """250 texts: 40 of up to 60 words and copies of them with some words replaced, and scores with ties."""
    draw = random.Random(seed)
    words = [f"w{k}" for k in range(200)]
    texts = [" ".join(draw.choices(words, k=draw.randrange(1, 60))) for _ in range(40)]
    while len(texts) < 250:
        copy = draw.choice(texts).split()
        for _ in range(draw.randrange(0, 4)):
            copy[draw.randrange(len(copy))] = draw.choice(words)
        texts.append(draw.choice([" ", ", ", " - "]).join(copy))
    draw.shuffle(texts)
    return texts, {i: float(draw.randrange(40)) for i in range(250)}


@pytest.mark.parametrize("ngram", [1, 3])
@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8, 1.0])
def test_collapse_equals_comparing_all_pairs(threshold: float, ngram: int) -> None:
    """Dropped is what the greedy rule drops with every pair compared by its n-grams, each for the best one like it."""
    texts, scores = mutated_texts(seed=ngram)
    expected = reference(texts, threshold, ngram, scores)
    assert 0 < len(expected) < 250
    found = collapse(NearDuplicates(threshold, ngram), scores, pool(texts), FormatOptions())
    assert found == {i: min(alike, key=lambda k: (-scores[k], k)) for i, alike in expected.items()}


@pytest.mark.parametrize("threshold", [0.01, 0.1, 0.3, 0.6, 0.9])
def test_nothing_is_dropped_for_a_text_below_the_threshold(threshold: float) -> None:
    """Whatever the candidates, each dropped row has one that stays, of no lower rank and at least that similar."""
    texts, scores = mutated_texts(seed=7)
    kept = stay(texts, threshold, 2, scores)
    sets = [shingles(text, 2) for text in texts]
    for i in set(range(250)) - set(kept):
        ahead = [k for k in kept if (-scores[k], k) < (-scores[i], i)]
        assert any(similarity(sets[i], sets[k]) >= threshold for k in ahead)


def test_the_highest_score_stays_and_of_equal_ones_the_earlier_row() -> None:
    """Of three equal texts the best stays; if two are best, the first of them."""
    assert stay(["a b c"] * 3, 0.9, scores={0: 1.0, 1: 3.0, 2: 2.0}) == [1]
    assert stay(["a b c"] * 3, 0.9, scores={0: 1.0, 1: 3.0, 2: 3.0}) == [1]


def test_likeness_to_a_dropped_text_drops_nothing() -> None:
    """In a chain of texts where neighbours alone are alike, the middle one goes and both ends stay."""
    assert stay(["a b c d e f", "a b c d e f g h", "c d e f g h"], 0.7, 1) == [0, 2]


def test_a_pair_at_the_threshold_collapses() -> None:
    """Four of five words in common are a similarity of 0.8, which is not below it."""
    assert stay(["a b c d", "a b c d e"], 0.8, 1) == [0]
    assert stay(["a b c d", "a b c d e"], 0.81, 1) == [0, 1]


def test_case_and_spaces_do_not_matter_but_marks_and_order_do() -> None:
    """Words are compared without case and the space between them; a sum is no difference, and shuffling tells."""
    assert stay(["Straße: nach  Rom!", "STRASSE : nach\nrom !"], 1.0) == [0]
    assert stay(["What is 3 + 4?", "What is 3 - 4?", "What is 3 + 4"], 1.0) == [0, 1, 2]
    assert stay(["x < y", "x > y", "3.14", "3 14"], 0.9, 1) == [0, 1, 2, 3]
    assert stay(["a b c d", "d c b a"], 0.1) == [0, 1]
    assert stay(["a b c d", "d c b a"], 1.0, ngram=1) == [0]


def test_short_texts_are_one_ngram_of_all_their_words() -> None:
    """Two words are not nothing: equal ones collapse, others stay, and so do texts of marks alone."""
    assert stay(["a b", "a c", "A  b"], 0.5) == [0, 1]
    assert stay(["+ ?", "- !", "+ ?"], 0.5) == [0, 1]


def test_only_the_examples_given_count() -> None:
    """Rows that could not be scored neither stay nor make others go, in whatever order ids come."""
    records = pool(["x y z", "x y z", "u v w"])
    assert collapse(NearDuplicates(0.5), {2: 1.0, 1: 0.0}, records, FormatOptions()) == {}


def test_without_a_threshold_all_stay() -> None:
    """Null is the default, and keeps equal texts too."""
    assert NearDuplicates().threshold is None
    assert stay(["a b c"] * 3, None) == [0, 1, 2]


def test_hashes_stand_for_the_ngrams() -> None:
    """Each different n-gram has one hash, and similarities of hashes are those of the n-grams."""
    texts, _ = mutated_texts(seed=3)
    sets, hashed = [shingles(text, 2) for text in texts], [hashed_shingles(text, 2) for text in texts]
    assert [len(one) for one in hashed] == [len(one) for one in sets]
    for i in range(0, 250, 5):
        for k in range(i, 250, 11):
            assert jaccard(hashed[i], hashed[k]) == similarity(sets[i], sets[k])


@pytest.mark.parametrize("threshold", [0.03, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0])
def test_a_pair_at_the_threshold_is_seldom_missed(threshold: float) -> None:
    """At most one in a thousand, with the bands within the signature, and no longer bands would do."""
    count, rows = bands(threshold)
    assert count * rows <= 256
    assert (1 - threshold**rows) ** count <= 1e-3
    if rows < 128:
        assert (1 - threshold ** (rows + 1)) ** (256 // (rows + 1)) > 1e-3


@pytest.mark.parametrize("threshold", [0.0, -0.5, 1.1, float("nan")])
def test_impossible_thresholds_are_refused(threshold: float) -> None:
    """Key and value are told."""
    with pytest.raises(UserError, match=rf"^model\.near_duplicates\.threshold is {threshold};"):
        NearDuplicates(threshold)


def test_ngrams_have_words() -> None:
    """Key and value are told."""
    with pytest.raises(UserError, match=r"^model\.near_duplicates\.ngram is 0;"):
        NearDuplicates(0.5, 0)
