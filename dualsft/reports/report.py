"""The report: reads every directory, puts the sections in order, draws the figures and writes the page."""

import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias, get_args

from dualsft.reports.audit import audit_section
from dualsft.reports.blocks import Section
from dualsft.reports.comparison import comparison_section
from dualsft.reports.evaluations.folder import read_evaluation
from dualsft.reports.evaluations.section import evaluations_section
from dualsft.reports.fits.folder import read_fit
from dualsft.reports.fits.section import fit_section, fits_section
from dualsft.reports.page import render
from dualsft.reports.selections.beside import selections_section
from dualsft.reports.selections.section import selection_section
from dualsft.reports.selections.subject import ComputeTokens, Subject
from dualsft.reports.sources import Kind, Source, find_sources
from dualsft.storage.writing import write_atomically

PAGE, FIGURES = "report.html", "figures"

_Maker: TypeAlias = Callable[[Sequence[Source], dict[Path, str]], list[Section]]
"""Makes the parts about the directories of one kind; the names are those of their figures' files."""


@dataclass(frozen=True)
class Report:
    """What the page shows.

    Attributes:
        title: Its title.
        sections: Its parts.
    """

    title: str
    sections: Sequence[Section]

    def write(self, output: Path) -> Path:
        """Write ``report.html`` and ``figures/``, in place of an earlier report there; return the page's path.

        Raises:
            UserError: if they cannot be written.
        """
        shutil.rmtree(output / FIGURES, ignore_errors=True)
        text = render(self.title, self.sections, output / FIGURES)
        write_atomically(output / PAGE, text)
        return output / PAGE


def make_report(folders: Sequence[str | os.PathLike[str]], compute_tokens: ComputeTokens | None = None) -> Report:
    """Make a report on directories that select, fit, validate, audit and compare have written.

    Args:
        folders: The directories.
        compute_tokens: Computes scores by token for the examples that are shown of a selection which kept none.

    Raises:
        UserError: if one of them is no such directory, or is damaged.
    """
    sources = find_sources(folders)
    return Report(_title(sources), _sections(sources, compute_tokens))


def _sections(sources: Sequence[Source], compute_tokens: ComputeTokens | None) -> list[Section]:
    """The page's parts: what stands beside each other first, then each directory, kind by kind."""
    names = _file_names(sources)
    makers: dict[Kind, _Maker] = {"selection": partial(_selections, compute_tokens), **_OTHERS}
    return [part for kind, make in makers.items() if (own := _of_kind(sources, kind)) for part in make(own, names)]


def _of_kind(sources: Sequence[Source], kind: Kind) -> list[Source]:
    return [source for source in sources if source.kind == kind]


def _selections(
    compute_tokens: ComputeTokens | None, sources: Sequence[Source], names: dict[Path, str]
) -> list[Section]:
    subjects = [Subject(source, names[source.folder], compute_tokens) for source in sources]
    beside = [selections_section(subjects)] if len(subjects) > 1 else []
    return [*beside, *map(selection_section, subjects)]


def _fits(sources: Sequence[Source], names: dict[Path, str]) -> list[Section]:
    fits = [read_fit(source) for source in sources]
    beside = [fits_section(fits)] if len(fits) > 1 else []
    return [*beside, *(fit_section(fit, names[of.folder]) for fit, of in zip(fits, sources, strict=True))]


def _evaluations(sources: Sequence[Source], names: dict[Path, str]) -> list[Section]:
    return [evaluations_section([read_evaluation(source) for source in sources])]


def _audits(sources: Sequence[Source], names: dict[Path, str]) -> list[Section]:
    return [audit_section(source, names[source.folder]) for source in sources]


def _comparisons(sources: Sequence[Source], names: dict[Path, str]) -> list[Section]:
    return [comparison_section(source, names[source.folder]) for source in sources]


_OTHERS: dict[Kind, _Maker] = {
    "fit": _fits,
    "evaluation": _evaluations,
    "audit": _audits,
    "comparison": _comparisons,
}


def _file_names(sources: Sequence[Source]) -> dict[Path, str]:
    """Folder -> what the files of its figures begin with: its name in plain characters, no two alike."""
    names: dict[Path, str] = {}
    for source in sources:
        plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", source.name).strip("-.") or source.kind
        taken = set(names.values())
        names[source.folder] = next(
            n for k in range(len(taken) + 1) if (n := f"{plain}-{k + 1}" if k else plain) not in taken
        )
    return names


def _title(sources: Sequence[Source]) -> str:
    if len(sources) == 1:
        return f"{sources[0].kind.capitalize()} {sources[0].name}"
    counts = {kind: len(_of_kind(sources, kind)) for kind in get_args(Kind)}
    parts = [f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in counts.items() if count]
    return f"Report on {', '.join(parts)}"
