"""``predictions.jsonl``: what a model answered to each prompt of the validation sets, and how it was judged."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from dualsft.data.options import validation_key
from dualsft.evaluation.generation import Answer, Generation

FILE = "predictions.jsonl"


@dataclass(frozen=True)
class Prediction:
    """One answer.

    Attributes:
        set: Name of the validation set; None for a single source.
        example_id: Row of the example in the set.
        prompt: What the model was given, special tokens included.
        generation: What it wrote.
        answer: The part of it that is compared; None if the pattern is not in it.
        reference: The example's own answer.
        reference_answer: The part of that which is compared.
        correct: Whether the two parts are equal.
        cut: Whether the model was still writing when it had written the most tokens that it may.
    """

    set: str | None
    example_id: int
    prompt: str
    generation: str
    answer: str | None
    reference: str
    reference_answer: str | None
    correct: bool
    cut: bool


def judged(name: str | None, example_id: int, answer: Answer, generation: Generation) -> Prediction:
    """An answer to an example of a set, compared with its reference; one that is not found is never correct."""
    own, due = generation.extract(answer.text), generation.extract(answer.reference)
    correct = own is not None and own == due
    return Prediction(name, example_id, answer.prompt, answer.text, own, answer.reference, due, correct, answer.is_cut)


def as_lines(predictions: Sequence[Prediction]) -> str:
    """The predictions as JSON lines: set by set in the order of the sets, and in each by row."""
    place = {name: number for number, name in enumerate(dict.fromkeys(one.set for one in predictions))}
    ordered = sorted(predictions, key=lambda one: (place[one.set], one.example_id))
    return "".join(f"{json.dumps(asdict(one), ensure_ascii=False)}\n" for one in ordered)


def cut_short(predictions: Sequence[Prediction], max_new_tokens: int) -> Iterator[str]:
    """A sentence on each set of which answers were cut."""
    counts = Counter(one.set for one in predictions)
    for name, cut in Counter(one.set for one in predictions if one.cut).items():
        yield (
            f"{cut:,} of the {counts[name]:,} answers to {validation_key(name)} were cut off after "
            f"{max_new_tokens:,} tokens; raise model.generation.max_new_tokens to let the model end them."
        )
