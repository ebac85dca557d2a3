"""What the documentation site is made of; CI builds it with warnings as errors."""

import re
from pathlib import Path

import pytest

from dev.site.commands import command_page, in_words, is_option, key_of, parser_behind
from dev.site.figure import PICTURE, draw, interactions
from dev.site.links import relinked
from dev.site.notebook import QUICKSTART, executed


@pytest.mark.parametrize("verb", ["select", "allocate", "quickstart", "plan"])
def test_command_pages_have_every_option(verb: str) -> None:
    """Each option of a command has one row, which says what it takes and what it is."""
    parser, rows = parser_behind(verb), command_page(verb).splitlines()
    assert parser is not None
    keys = [key_of(action) for action in parser._actions if is_option(action)]
    assert len(keys) > 2
    for key in keys:
        (row,) = [line for line in rows if line.startswith(f"| `{key}` | ")]
        _, _, takes, _, told, _ = row.replace("\\|", "").split("|")
        assert takes.strip(), row
        assert told.strip(), row
    default = {"select": "0.1", "allocate": "as in SELECTION"}.get(verb)
    if default:
        assert any(row.startswith(f"| `model.data_budget` | integer or number or null | `{default}` |") for row in rows)


def test_types_are_in_words() -> None:
    """Of a configuration, not of Python."""
    assert in_words(int | None) == "integer or null"
    assert in_words(list[str] | None) == "list of text or null"
    assert in_words(dict[str, int]) == "keys and values"
    assert in_words(Path) == "Path by name or class path"


def test_links_lead_to_pages() -> None:
    """Links of a file lead to the pages of what they name; what has none is named, and code is left alone."""
    pages = {"docs/a.md": "a.md", "docs/b/c.md": "b/c.md", "README.md": "index.md"}
    text = "[a](../a.md#x) [top](../../README.md) [the code](../../x/y.py) [y.py](../../x/y.py) [w](https://w)\n"
    led = "[a](../a.md#x) [top](../index.md) the code (`x/y.py`) `x/y.py` [w](https://w)\n"
    assert relinked(text, "docs/b/c.md", "b/c.md", pages) == led
    assert relinked("[c](docs/b/c.md)", "README.md", "index.md", pages) == "[c](b/c.md)"
    block = "```bash\n[a](../../x/y.py)\n```"
    assert relinked(block, "docs/b/c.md", "b/c.md", pages) == block


def test_the_figure_is_the_scripts() -> None:
    """The picture is what the script draws, of a matrix whose row and column sums add up to the same number."""
    assert PICTURE.read_text(encoding="utf-8") == draw()
    m = interactions()
    assert sum(map(sum, m)) == pytest.approx(sum(map(sum, zip(*m, strict=True))))


@pytest.mark.heavy
def test_the_notebook_runs(tmp_path: Path) -> None:
    """From first to last cell, on few rows and for a few steps; the last cell answers as many rows as are shown."""
    small = {
        "rows, path_epochs, epochs = 640, 16, 12": "rows, path_epochs, epochs = 80, 2, 1",
        "most_pieces=8": "pieces=2, most_pieces=2",
    }
    shown = QUICKSTART.read_text(encoding="utf-8")
    assert all(text in shown for text in small)
    notebook = executed(QUICKSTART, small, tmp_path)
    printed = ["".join(output.text for output in cell.get("outputs", [])) for cell in notebook.cells]
    assert sum(map(int, re.findall(r"\d+", printed[4]))) == 8
    assert printed[-2].count("wanted") == shown.count("    wanted  who")
