"""The quick start's figures as a table."""

from collections.abc import Sequence
from dataclasses import dataclass

from dualsft.runs.table import markdown_table


@dataclass(frozen=True)
class Row:
    """One model and its figures on held-out rows.

    Attributes:
        name: Which model.
        target_loss: On the target, in nats per supervised token.
        general_loss: On the tasks that the base model knows, in nats per supervised token.
        general_exact_match: Share of those tasks answered exactly, by greedy generation.
        examples: Share of the pool that was trained on.
        weights: Share of the weights that was trained.
        clean_target: Share of the training examples that are clean target rows; None for the base model.
    """

    name: str
    target_loss: float
    general_loss: float
    general_exact_match: float
    examples: float
    weights: float
    clean_target: float | None


def table(rows: Sequence[Row]) -> str:
    """The rows under their headings, as Markdown that also reads well in a terminal."""
    headings = ["model", "target loss", "general loss", "general exact match", "examples", "weights", "clean target"]
    cells = [headings]
    for row in rows:
        shares = (row.general_exact_match, row.examples, row.weights, row.clean_target)
        formatted = ["-" if share is None else f"{share:.0%}" for share in shares]
        cells.append([row.name, f"{row.target_loss:.3f}", f"{row.general_loss:.3f}", *formatted])
    return markdown_table(cells)
