"""The quick start's figures as a table, and answers side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

from dualsft.runs.table import markdown_table


@dataclass(frozen=True)
class Row:
    """One model and its figures on held-out rows.

    Attributes:
        name: Which model.
        target: Share of the target's rows that it answers word for word, by greedy generation.
        general: Share of the rows of tasks that the base model knows.
        forgetting: By how much its loss on these rows is higher than the base model's, in nats per supervised token.
        examples: Share of the pool that was trained on.
        weights: Share of the weights that was trained.
        clean: Share of the training examples that are clean target rows; None for the base model.
        seconds: What it took to choose and to train.
    """

    name: str
    target: float
    general: float
    forgetting: float
    examples: float
    weights: float
    clean: float | None
    seconds: float


def table(rows: Sequence[Row]) -> str:
    """The rows under their headings, as Markdown that also reads well in a terminal."""
    cells = [["model", "target", "general", "forgetting", "examples", "weights", "clean target", "time"]]
    for row in rows:
        shares = (row.examples, row.weights, row.clean)
        told = ["-" if share is None else f"{share:.0%}" for share in shares]
        cells.append(
            [
                row.name,
                f"{row.target:.0%}",
                f"{row.general:.0%}",
                f"{row.forgetting:+.2f}",
                *told,
                f"{row.seconds:.0f} s",
            ]
        )
    return markdown_table(cells)


@dataclass(frozen=True)
class Answer:
    """A held-out prompt, and what is answered to it.

    Attributes:
        prompt: The prompt.
        due: Its own answer.
        before: The base model's.
        after: The trained model's.
    """

    prompt: str
    due: str
    before: str
    after: str


def side_by_side(answers: Sequence[Answer]) -> str:
    """Each prompt with what was answered before and after."""
    lines = []
    for one in answers:
        mark = "" if one.after == one.due else f"   (right: {one.due})"
        lines += [one.prompt.strip(), f"    before  {one.before}", f"    after   {one.after}{mark}"]
    return "\n".join(lines)
