"""The final table of a fit, several fits beside each other, and what the model forgot."""

from collections.abc import Sequence

from dualsft.reports.blocks import Block, Table, Text
from dualsft.reports.fits.folder import Fit
from dualsft.reports.words import duration, listed, memory, number, percent, signed

_LOWER_IS_BETTER = ("loss", "perplexity", "example_loss")


def final_table(fit: Fit) -> list[Block]:
    """Every metric of the validation before and after; sets with names have theirs."""
    validation = fit.figures.validation
    before, after = validation.base or {}, validation.metrics or {}
    if not before and not after:
        return [Text("The fit made no validation, so that nothing is known of what it learnt.", "note")]
    rows = [
        [name, number(before.get(name)), number(after.get(name)), _change(name, before, after)]
        for name in after or before
    ]
    caption = "Validation of the base model and of the fit"
    caption += f", at step {validation.step:,}" if validation.step is not None else ""
    return [Table(caption, ["metric", "base model", "after the fit", "change"], rows)]


def _change(name: str, before: dict[str, float], after: dict[str, float]) -> str:
    if name not in before or name not in after:
        return "–"
    change = after[name] - before[name]
    if not change:
        return "0"
    better = (change < 0) == (name.partition("/")[0] in _LOWER_IS_BETTER)
    return f"{signed(change)} ({'better' if better else 'worse'})"


def forgotten(fit: Fit) -> list[Block]:
    """The sets whose loss rose, and the sampled answers that were right before and are not any more."""
    validation = fit.figures.validation
    before, after = validation.base or {}, validation.metrics or {}
    names = [name for name in after if name.startswith("loss/") and name in before]
    worse = [name for name in names if after[name] > before[name]]
    if not names:
        told = (
            "One validation set says nothing of other skills. To see what is forgotten, name a set of what the model "
            "could do before beside the target's: data.validation: {target: ..., general: ...}."
        )
        return [Text(told, "note")]
    if not worse:
        return [Text(f"Nothing on {listed([_set(name) for name in names])}: no set has a higher loss than before.")]
    rows = [
        [_set(name), number(before[name]), number(after[name]), signed(after[name] - before[name])] for name in worse
    ]
    return [Table("Sets whose loss rose, in nats per token", ["set", "base model", "after the fit", "forgotten"], rows)]


def _set(name: str) -> str:
    return name.removeprefix("loss/")


def fits_beside(fits: Sequence[Fit]) -> Table:
    """One row for each fit: what it trained, what came out, what it cost."""
    names = dict.fromkeys(name for fit in fits for name in _shown(fit))
    rows = [["base model", "–", "–", *(_of_base(fits, name) for name in names), "–", "–"]]
    for fit in fits:
        of, after = fit.figures, fit.figures.validation.metrics or {}
        trained = percent(of.weights.trained / max(of.weights.all, 1))
        costs = [duration(of.seconds), memory(of.peak_memory_bytes)]
        rows.append([fit.name, f"{of.examples.each_epoch:,}", trained, *(number(after.get(n)) for n in names), *costs])
    head = ["fit", "examples", "weights", *names, "time", "peak memory"]
    return Table("The fits beside each other; metrics are those of their last validations", head, rows)


def _shown(fit: Fit) -> list[str]:
    return list(fit.figures.validation.metrics or {})


def _of_base(fits: Sequence[Fit], name: str) -> str:
    """The base model's metric, if the fits agree on it: they may have other bases or other validation sets."""
    values = {number(base[name]) for fit in fits if name in (base := fit.figures.validation.base or {})}
    return values.pop() if len(values) == 1 else "–"
