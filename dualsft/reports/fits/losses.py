"""The loss curves of fits: training batches with their running mean, and validations."""

from collections.abc import Sequence
from typing import Any

from dualsft.reports.blocks import Block, Picture, Table, Text
from dualsft.reports.figures import grid, smoothed, thinned
from dualsft.reports.fits.folder import TRAINED, Fit
from dualsft.reports.words import number

_VALIDATION = "val_loss"
_WINDOW, _WINDOWS = 5, 10  # batches in a running mean at least, and such means in a curve
_MOST_CURVES = 5  # colours that can be told apart


def loss_curves(fit: Fit, name: str) -> list[Block]:
    """The curves of one fit: its training loss, and the validation loss of each set."""
    steps, losses = fit.losses(TRAINED)
    sets = _validations(fit)
    if not steps and not sets:
        return [Text("The fit kept no metrics.csv (another logger, or none), so there are no curves.", "note")]
    first, last = (losses[0], losses[-1]) if losses else (None, None)
    alt = f"Line chart over {fit.figures.steps:,} steps: the training loss goes from {number(first)} to {number(last)}"
    return [
        Picture(
            f"{name}-losses",
            "Loss in nats per supervised token: single batches (faint), their running mean, and validations (dots).",
            f"{alt}; the numbers of the validations are in the table below.",
            lambda figure: _paint(figure, fit),
            numbers=_table(fit, sets),
        )
    ]


def curves_beside(fits: Sequence[Fit]) -> list[Block]:
    """The validation losses of several fits in one figure."""
    shown = [fit for fit in fits if fit.losses(_VALIDATION)[0]][:_MOST_CURVES]
    if len(shown) < 2:
        return []
    ends = ", ".join(f"{fit.name} {number(fit.losses(_VALIDATION)[1][-1])}" for fit in shown)
    left = f" (the first {_MOST_CURVES} of {len(fits)})" if len(fits) > len(shown) == _MOST_CURVES else ""
    return [
        Picture(
            "validation-losses",
            f"Validation loss of the fits over their steps{left}, from the base model on where it was validated.",
            f"Line chart of the validation losses; they end at {ends} nats per token.",
            lambda figure: _paint_beside(figure, shown),
        )
    ]


def _validations(fit: Fit) -> list[str]:
    """The columns of validation losses: of each set, or of the only one."""
    columns = list(dict.fromkeys(key for row in fit.log for key in row if key.startswith(_VALIDATION)))
    return [key for key in columns if key != _VALIDATION] or columns


def _with_base(fit: Fit, column: str) -> tuple[list[float], list[float]]:
    """The validations of a column, the base model's as step 0 before them."""
    steps, values = fit.losses(column)
    base = (fit.figures.validation.base or {}).get(column.removeprefix("val_"))
    return ([0.0, *steps], [base, *values]) if base is not None and 0.0 not in steps else (steps, values)


def _paint(figure: Any, fit: Fit) -> None:
    axes = figure.subplots()
    steps, losses = fit.losses(TRAINED)
    if steps:
        at = thinned(len(steps))
        mean = smoothed(losses, max(_WINDOW, len(losses) // _WINDOWS))
        axes.plot([steps[k] for k in at], [losses[k] for k in at], color="C0", alpha=0.3, linewidth=0.8)
        axes.plot([steps[k] for k in at], mean[at], color="C0", label="training, running mean")
    for place, column in enumerate(_validations(fit)[:_MOST_CURVES], 1):
        label = f"validation {column.removeprefix(_VALIDATION).removeprefix('/')}".strip()
        axes.plot(*_with_base(fit, column), color=f"C{place % 5}", marker="o", markersize=4, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.legend()
    grid(axes)


def _paint_beside(figure: Any, fits: Sequence[Fit]) -> None:
    axes = figure.subplots()
    for place, fit in enumerate(fits):
        axes.plot(*_with_base(fit, _VALIDATION), color=f"C{place}", marker="osD^v"[place], markersize=4, label=fit.name)
    axes.set(xlabel="optimizer step", ylabel="validation loss (nats per token)")
    axes.legend()
    grid(axes)


def _table(fit: Fit, sets: Sequence[str]) -> Table | None:
    """The validations in numbers, at most as many as one reads."""
    if not sets:
        return None
    steps, _ = _with_base(fit, sets[0])
    columns = [dict(zip(*_with_base(fit, column), strict=True)) for column in sets]
    rows = [
        [f"{int(steps[k]):,}", *(number(column.get(steps[k])) for column in columns)] for k in thinned(len(steps), 25)
    ]
    names = [column.removeprefix("val_").replace("loss/", "") for column in sets]
    return Table("The validations in numbers", ["step", *names], rows, folded=True)
