"""The results of a run as one JSON file, written anew after every figure: a run that is cut leaves all it had."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Outcome:
    """What became of a section.

    Attributes:
        what: What it finds out.
        figures: Name, value and unit of each figure, in order.
        seconds: How long it took.
        outcome: ``running``, ``done``, ``failed``, ``stopped`` at its time limit, or ``skipped``.
        reason: The error's first line, or why it was stopped or skipped.
    """

    what: str
    figures: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    outcome: str = "running"
    reason: str = ""


class Results:
    """All outcomes, in a file.

    Args:
        path: The file; None keeps them in memory alone.
        about: What was run: the command, the scale, the budget.
    """

    def __init__(self, path: Path | None, about: dict[str, Any]) -> None:
        self._path, self.about = path, about
        self.sections: dict[str, Outcome] = {}

    def write(self) -> None:
        """Replace the file by one with everything so far."""
        if self._path is None:
            return
        content = {"about": self.about, "sections": {name: asdict(found) for name, found in self.sections.items()}}
        beside = self._path.with_suffix(".part")
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        beside.replace(self._path)


def read_results(path: Path) -> Results:
    """The results in a file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    results = Results(None, content["about"])
    results.sections = {name: Outcome(**found) for name, found in content["sections"].items()}
    return results
