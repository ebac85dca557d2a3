"""What a fit was asked for and what came out, in one paragraph."""

from pathlib import Path
from typing import Any

from dualsft.reports.blocks import Text
from dualsft.reports.fits.folder import Fit
from dualsft.reports.words import counted, duration, memory, number, percent, short


def story(fit: Fit) -> Text:
    """The paragraph."""
    return Text(" ".join(part for part in (_asked(fit), _came_out(fit), _cost(fit)) if part), "lead")


def _asked(fit: Fit) -> str:
    of, model = fit.figures, fit.settings.get("model") or {}
    base = _name(model.get("model_name_or_path"))
    weights = f"{percent(of.weights.trained / max(of.weights.all, 1))} of the {short(of.weights.all)} weights"
    chosen = _name(model.get("selection"))
    return (
        f"Trained {weights} of {base or 'the base model'} on {counted(of.examples.each_epoch, 'example')}, "
        f"{f'chosen by the selection {chosen}' if chosen else 'without a selection'}: "
        f"{counted(of.steps, 'step')} in {counted(of.epochs, 'epoch')}."
    )


def _name(path: Any) -> str:
    return "/".join(Path(str(path)).parts[-2:]) if path else ""


def _came_out(fit: Fit) -> str:
    validation = fit.figures.validation
    before, after = (validation.base or {}).get("loss"), (validation.metrics or {}).get("loss")
    if after is None:
        return "It was not validated."
    if before is None:
        return f"The validation loss ends at {number(after)} nats per token; the base model was not validated."
    went = "fell" if after < before else "rose" if after > before else "stayed"
    return f"The validation loss {went} from {number(before)} to {number(after)} nats per token."


def _cost(fit: Fit) -> str:
    of = fit.figures
    return f"It took {duration(of.seconds)} and {memory(of.peak_memory_bytes)} of memory at most."
