"""The quick start's figures as a table."""

from collections.abc import Sequence
from dataclasses import dataclass

from dualsft.runs.table import markdown_table


@dataclass(frozen=True)
class Row:
    """What was trained, and what it gave on held-out rows.

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
    return markdown_table([headings, *([_cell(value) for value in _values(row)] for row in rows)])


def _values(row: Row) -> list[object]:
    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.0%}"

    shares = [share(row.general_exact_match), share(row.examples), share(row.weights), share(row.clean_target)]
    return [row.name, row.target_loss, row.general_loss, *shares]


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
