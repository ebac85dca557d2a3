"""What is kept of generated answers."""

import json

from dualsft.evaluation import Generation
from dualsft.evaluation.generation import Answer
from dualsft.evaluation.predictions import Prediction, as_lines, cut_short, judged

GSM8K = Generation(8, r"#### (-?[\d.,]+)")


def test_an_answer_is_judged_by_what_is_compared() -> None:
    """The extracted parts decide, and are kept; an answer that is not found is wrong, even where neither is."""
    right = judged("a", 3, Answer("2 + 2?", "so\n#### 1,004", "#### 1004", False), GSM8K)
    assert right == Prediction("a", 3, "2 + 2?", "so\n#### 1,004", "1004", "#### 1004", "1004", True, False)
    for text, reference in (("#### 5", "#### 4"), ("4", "#### 4"), ("4", "4")):
        assert not judged(None, 0, Answer("?", text, reference, True), GSM8K).correct


def test_lines_are_in_the_order_of_sets_and_rows() -> None:
    """However the batches were, a set's answers come by row; text stays as it is, and a line each."""
    answer = Answer("é\u2028?", "a\nb", "c", False)
    made = [judged(name, row, answer, Generation(8)) for name, row in (("z", 2), ("z", 0), ("a", 1), ("a", 0))]
    rows = [json.loads(line) for line in as_lines(made).split("\n") if line]
    assert [(row["set"], row["example_id"]) for row in rows] == [("z", 0), ("z", 2), ("a", 0), ("a", 1)]
    assert rows[0]["generation"] == "a\nb"
    assert "é" in as_lines(made)


def test_cut_answers_are_told_by_set() -> None:
    """Each set with such answers has a sentence with their number and what to raise; others have none."""
    cuts = {"a": [True, False, True], "b": [False]}
    made = [
        judged(name, row, Answer("?", "x", "y", cut), Generation(8))
        for name, of_set in cuts.items()
        for row, cut in enumerate(of_set)
    ]
    (told,) = cut_short(made, 8)
    assert told.startswith(
        "2 of the 3 answers to data.validation.a were cut off after 8 tokens; raise model.generation"
    )
