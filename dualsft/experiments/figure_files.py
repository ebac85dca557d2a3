"""Figures as files: each as PNG and as SVG, the same bytes whenever it is drawn."""

from pathlib import Path
from typing import Any

from dualsft.storage.writing import writing_to


def save_figure(figure: Any, folder: Path, name: str) -> list[str]:
    """Save a figure of matplotlib in a folder, which is made if need be; return the files' names."""
    import matplotlib

    files = [f"{name}.{kind}" for kind in ("png", "svg")]
    with writing_to(folder), matplotlib.rc_context({"svg.hashsalt": name}):
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            figure.savefig(folder / file, metadata={"Date": None} if file.endswith("svg") else None)
    return files
