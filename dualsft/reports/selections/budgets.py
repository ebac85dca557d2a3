"""What other budgets would take: the share of the positive score that each one captures, on both sides."""

from typing import Any

from dualsft.reports.blocks import Block, Picture, Table, Text
from dualsft.reports.figures import frame, grid
from dualsft.reports.selections.subject import Subject
from dualsft.reports.words import listed, percent
from dualsft.selection.diagnostics import ScoreFigures

_SHOWN = (1, 2, 5, 10, 20, 30, 50, 75, 100)  # percent


def budgets(subject: Subject) -> list[Block]:
    """The curves with the chosen points, and what half and twice the budget would capture."""
    sides = _sides(subject)
    if not sides:
        return [Text("No score is positive, so no budget captures anything.")]
    told = " ".join(_told(name, of) for name, of in sides.items())
    picture = Picture(
        f"{subject.file_name}-budgets",
        "Share of the sum of all positive scores that the highest ones hold, by the share of them that is taken; the "
        "dots are this selection. A dot below its curve was chosen by more than the score: |φ|, quotas, or diversity.",
        f"Two rising curves over the budget. {told}",
        lambda figure: _paint(figure, sides),
        numbers=_numbers(sides),
    )
    return [Text(told), picture]


def _sides(subject: Subject) -> dict[str, ScoreFigures]:
    found = subject.selection.diagnostics
    sides = {"examples": found.examples, "weights": found.parameters}
    return {name: of for name, of in sides.items() if of is not None and of.capture}


def _told(name: str, of: ScoreFigures) -> str:
    share = of.selected / of.scored if of.scored else 0.0
    if of.captured is None or not 0 < share < 1:
        return f"Of the {name}, all are taken."
    held = f"The chosen {percent(share)} of the {name} hold {percent(of.captured)} of the positive score"
    others = [found for count in (of.selected // 2, 2 * of.selected) if (found := of.best(count)) is not None]
    then = [f"{percent(captured)} with the best {percent(number / of.scored)}" for number, captured in others]
    return f"{held}; it would be {listed(then)}." if then else f"{held}."


def _paint(figure: Any, sides: dict[str, ScoreFigures]) -> None:
    axes = figure.subplots()
    axes.plot([0, 100], [0, 100], color=frame(), linewidth=0.8, linestyle=":", label="taken at random")
    for place, (name, of) in enumerate(sides.items()):
        axes.plot(range(101), [0, *(100 * share for share in of.capture)], color=f"C{place}", label=name)
        if of.captured is not None and of.scored:
            point = 100 * of.selected / of.scored, 100 * of.captured
            axes.plot(*point, marker="o", markersize=7, color=f"C{place}", linestyle="none")
    axes.set(xlabel="budget (% of all)", ylabel="positive score captured (%)", xlim=(-1, 101), ylim=(-1, 103))
    axes.legend(loc="lower right")
    grid(axes, "both")


def _numbers(sides: dict[str, ScoreFigures]) -> Table:
    rows = [[f"{k}%", *(percent(of.capture[k - 1]) for of in sides.values())] for k in _SHOWN]
    return Table("Positive score captured by each budget", ["budget", *sides], rows, folded=True)
