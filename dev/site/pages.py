"""The pages that are not files in docs/: files beside it, commands, Python names, notebooks."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dualsft
from dev.site.commands import command_page
from dualsft.cli import VERBS

ROOT = Path(__file__).parents[2]
BESIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "plugins/dualsft-baselines/README.md": "plugins/baselines.md",
    "plugins/template/README.md": "plugins/template.md",
}
"""Path of a file in the repository -> path of its page in the site's sources."""


def made_pages() -> dict[str, str]:
    """Path in the site's sources -> text, of every page that is made from something else."""
    beside = {page: (ROOT / file).read_text(encoding="utf-8") for file, page in BESIDE.items()}
    commands = {f"reference/commands/{verb}.md": command_page(verb) for verb in VERBS}
    books = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
    notebooks = {f"notebooks/{book.stem}.md": notebook_page(book) for book in books}
    return {**beside, **commands, **notebooks, "reference/python.md": python_page()}


def python_page() -> str:
    """The public names, for mkdocstrings to fill in; of Lightning's modules without the hooks that it calls."""
    parts = ["# Python", "The public names. Each is imported by `from dualsft import NAME`."]
    for name in sorted(dualsft.__all__):
        hooks = "\n    options:\n      members: false" if name.endswith("Module") else ""
        parts.append(f"::: dualsft.{name}{hooks}")
    return "\n\n".join(parts) + "\n"


def notebook_page(path: Path) -> str:
    """A notebook as Markdown: its text, its code, and what the code printed and drew."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    title, *rest = [part for cell in cells for part in _parts(cell)]
    download = f"[Download the notebook]({path.name}) and run it with Jupyter where dualsft is installed."
    return "\n\n".join([title, download, *rest]) + "\n"


def _parts(cell: dict[str, Any]) -> Iterator[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] != "code":
        yield source
        return
    yield f"```python\n{source}\n```"
    for output in cell["outputs"]:
        shown = output.get("data", {})
        if "image/png" in shown:
            yield f"![What the code draws](data:image/png;base64,{''.join(shown['image/png'].split())})"
        elif text := "".join(output.get("text", shown.get("text/plain", ""))):
            yield f"```text\n{text.rstrip()}\n```"
