"""The part of the page about an audit: its verdicts, their figures in numbers, and the pictures."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dualsft.errors import UserError
from dualsft.reports.blocks import Block, Drawn, Section, Table, Text
from dualsft.reports.sources import Source
from dualsft.reports.words import counted, number, signed

_SIDES = {"data": "examples", "parameters": "weights", "joint": "both together"}
_ESTIMATES = {
    "spearman": "rank correlation",
    "slope": "slope",
    "factor": "times too large",
    "chosen_over_random": "gain over random",
    "chosen_over_lowest": "gain over lowest",
}
"""Keys of the figures that the table shows -> the column."""
_PICTURES = {
    "predicted": "Predicted against measured gains: each point is one variant, trained as the fit would",
    "bands": "Measured gains over the bands of the ranking, the highest scores first",
}


def audit_section(source: Source, name: str) -> Section:
    """All about one audit; its figures' files begin with a name.

    Raises:
        UserError: if its ``audit.json`` is damaged.
    """
    path = source.folder / "audit.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        verdicts = list(_verdicts(found))
        blocks: list[Block] = [_lead(found, verdicts), _told(verdicts), _table(verdicts), *_failures(found)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); run the audit again.") from error
    pictures = list(_pictures(source.folder / "figures", name))
    return Section(
        f"Audit: {source.name}", blocks, [Section("Predicted and measured gains", pictures)] if pictures else []
    )


def _verdicts(found: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Side, scorer and figures."""
    for side in _SIDES:
        for scorer, figures in found.get(side, {}).items():
            yield side, scorer, figures


def _lead(found: dict[str, Any], verdicts: list[tuple[str, str, dict[str, Any]]]) -> Text:
    runs = max((of["runs"] for _, _, of in verdicts), default=0)
    sizes = "in nats" if found["calibrated"] else "by their order alone, as these scores are no gains in nats"
    return Text(
        f"How far the scores of the selection {Path(found['selection']).name} can be trusted: up to "
        f"{counted(runs, 'variant')} a side were trained as the fit would, and the gains that came were compared with "
        f"those that the scores predict, {sizes}.",
        "lead",
    )


def _told(verdicts: list[tuple[str, str, dict[str, Any]]]) -> Table:
    rows = [[f"{_SIDES[side]}, {scorer}", of["verdict"].replace("; ", ";\n")] for side, scorer, of in verdicts]
    return Table("The verdicts", ["side and scorer", "verdict"], rows, frozenset({1}))


def _table(verdicts: list[tuple[str, str, dict[str, Any]]]) -> Table:
    rows = [
        [f"{_SIDES[side]}, {scorer}", *(_estimate(of, key) for key in _ESTIMATES), f"{of['runs']:,}"]
        for side, scorer, of in verdicts
    ]
    caption = "Figures with their 95% intervals; gains in nats"
    return Table(caption, ["side and scorer", *_ESTIMATES.values(), "runs"], rows)


def _estimate(of: dict[str, Any], key: str) -> str:
    value, interval = of.get(key), of.get(f"{key}_interval")
    if value is None:
        return "–"
    show = signed if key.startswith("chosen") else number
    return f"{show(value, 2)} ({show(interval[0], 2)} to {show(interval[1], 2)})" if interval else show(value, 2)


def _failures(found: dict[str, Any]) -> list[Block]:
    failures = found.get("failures", [])
    if not failures:
        return []
    return [
        Table(
            "Runs that failed and are left out",
            ["run", "why"],
            [[f["name"], f["error"]] for f in failures],
            frozenset({1}),
        )
    ]


def _pictures(folder: Path, name: str) -> Iterator[Drawn]:
    for path in sorted(folder.glob("*.png")):
        kind, _, label = path.stem.partition("-")
        if kind in _PICTURES:
            caption = f"{_PICTURES[kind]} ({label.replace('-', ' ')})."
            yield Drawn(f"{name}-{path.stem}", caption, f"{caption} The table above has its figures.", path)
