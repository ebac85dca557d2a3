"""The part of the page about a comparison: its tables, its pictures, and the runs that failed."""

import json
from collections.abc import Iterator
from pathlib import Path

from dualsft.errors import UserError
from dualsft.reports.blocks import Block, Drawn, Section, Table, Text
from dualsft.reports.sources import Source

_TABLES = {
    "table.md": ("Quality of each method: means over the seeds", "Costs of each method"),
    "overlaps.md": ("Overlap of the methods' choices (Jaccard), and by chance",),
}
_AXES = {"forgetting": "forgetting", "time": "time", "memory": "peak memory", "size": "file size"}


def comparison_section(source: Source, name: str) -> Section:
    """All about one comparison; its figures' files begin with a name.

    Raises:
        UserError: if a file of it cannot be read.
    """
    folder = source.folder
    blocks = [block for file, captions in _TABLES.items() for block in _blocks(folder / file, captions)]
    blocks += _failures(folder / "failures.json")
    pictures = list(_pictures(folder / "figures", name))
    layers = _layers(folder / "layers.md")
    sections = [Section("Gain against cost", pictures)] if pictures else []
    sections += [Section("Where the chosen weights are", layers)] if layers else []
    lead = Text("Every method was trained under the same budgets, seeds and settings, and measured alike.", "lead")
    return Section(f"Comparison: {source.name}", [lead, *blocks], sections)


def _blocks(path: Path, captions: tuple[str, ...]) -> Iterator[Block]:
    """The tables and paragraphs of a Markdown file that a comparison wrote."""
    left = list(captions)
    for paragraph in _text(path).strip().split("\n\n") if path.is_file() else ():
        if paragraph.startswith("|"):
            yield _table(paragraph, left.pop(0) if left else path.stem)
        elif paragraph:
            yield Text(paragraph, "note")


def _table(paragraph: str, caption: str) -> Table:
    """A table as `dualsft.runs.table.markdown_table` writes it; stars mark the best, in words here."""
    head, _, *rows = ([_cell(cell) for cell in line[1:-1].split(" | ")] for line in paragraph.splitlines())
    return Table(caption, head, [[*row, *[""] * (len(head) - len(row))] for row in rows])


def _cell(text: str) -> str:
    plain = text.strip()
    return f"{plain[2:-2]} ★" if plain.startswith("**") and plain.endswith("**") and len(plain) > 4 else plain


def _layers(path: Path) -> list[Block]:
    """The densities by layer and kind, one folded table a method, and the heat map of all."""
    if not path.is_file():
        return []
    parts = [part.partition("\n\n") for part in _text(path).split("\n## ")[1:]]
    tables = [Table(f"{title}: weights chosen, in percent", *_parts(body)) for title, _, body in parts]
    return [Table(t.caption, t.head, t.rows, folded=True) for t in tables]


def _parts(body: str) -> tuple[list[str], list[list[str]]]:
    table = _table(body.strip(), "")
    return list(table.head), [list(row) for row in table.rows]


def _failures(path: Path) -> list[Block]:
    try:
        found = json.loads(_text(path)) if path.is_file() else []
        rows = [[f["run"], f["error"]] for f in found]
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); run the comparison again.") from error
    return [Table("Runs that failed", ["run", "why"], rows, frozenset({1}))] if rows else []


def _pictures(folder: Path, name: str) -> Iterator[Drawn]:
    for path in sorted(folder.glob("*.png")):
        kind, _, axis = path.stem.rpartition("-")
        if kind == "gain-against":
            caption = (
                f"Gain against {_AXES.get(axis, axis)}; the line leads along the methods that no other one dominates."
            )
        else:
            caption = "Share of the weights that is chosen, by layer and kind of module."
        yield Drawn(f"{name}-{path.stem}", caption, f"{caption} The tables have its figures.", path)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); run the comparison again.") from error
