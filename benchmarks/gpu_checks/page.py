"""The figures of a run as a page in Markdown."""

from collections.abc import Iterator
from typing import Any

from dualsft.runs.table import markdown_table
from gpu_checks.results import Outcome, Results


def page(results: Results) -> str:
    """A line about the run, then for each section what it finds out, what became of it, and its figures."""
    return "\n".join(_lines(results)).rstrip() + "\n"


def _lines(results: Results) -> Iterator[str]:
    yield "; ".join(f"{name} {value}" for name, value in results.about.items()) + "."
    for name, found in results.sections.items():
        yield f"\n### {name}\n"
        yield f"{found.what} {_outcome(found)}\n"
        if found.figures:
            rows = [
                ["figure", "value", "unit"],
                *([_text(f["name"]), _value(f["value"]), f["unit"]] for f in found.figures),
            ]
            yield markdown_table(rows)


def _outcome(found: Outcome) -> str:
    reason = f": {found.reason}" if found.reason else ""
    took = f" in {found.seconds:.0f} s" if found.seconds else ""
    return f"*{found.outcome.capitalize()}{took}{reason}.*"


def _value(value: Any) -> str:
    if isinstance(value, str):
        return _text(value)
    if value == int(value) and abs(value) < 1e12:
        return f"{int(value):,}"
    return f"{value:.3g}" if abs(value) < 1e-2 or abs(value) >= 1e4 else f"{value:.3f}"


def _text(value: str) -> str:
    return value.replace("|", "/")
