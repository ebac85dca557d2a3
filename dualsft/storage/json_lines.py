"""Reads files of JSON lines."""

from pathlib import Path


def json_lines(path: Path) -> list[str]:
    """The lines of a file, of which a line feed alone ends one; none if there is no file.

    `str.splitlines` would also cut at the separators of Unicode (U+2028, U+0085), which JSON leaves within texts.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return [line for line in text.split("\n") if line]
