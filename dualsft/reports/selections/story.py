"""What a selection was asked for and what came out, in one paragraph of plain words."""

import re
from pathlib import Path
from typing import Any

from dualsft.reports.blocks import Block, Table, Text
from dualsft.reports.selections.subject import Subject
from dualsft.reports.words import counted, duration, listed, memory, number, percent, short
from dualsft.selection.json_values import Part
from dualsft.selection.manifest import Source
from dualsft.selection.summary.cautions import cautions

_SHOWN_SOURCES = 3


def story(subject: Subject) -> list[Block]:
    """The paragraph, what is odd about the selection, and the settings in a table that opens."""
    parts = [_asked(subject), _how(subject), _examples(subject), _weights(subject), _cost(subject)]
    told = Text(" ".join(part for part in parts if part), "lead")
    return [told, *_cautions(subject), *_unit(subject), _settings(subject)]


def _asked(subject: Subject) -> str:
    about = subject.about
    validation = about.data.validation
    sets = [validation] if isinstance(validation, Source) else list(validation.values())
    rows = counted(sum(of.rows for of in sets), "row")
    model = "/".join(Path(about.model.name_or_path).parts[-2:])
    return (
        f"Which of the {counted(about.counts.examples.rows, 'example')} of {_file(about.data.train.path)}, and which "
        f"of the {short(about.counts.parameters.scored)} weights of {model}, teach most of what "
        f"{listed([_file(of.path) for of in sets])} ({rows}) asks for?"
    )


def _file(given: Any) -> str:
    """What a source is called: its file, or the names of several."""
    if isinstance(given, dict):
        return listed([str(name) for name in given])
    if isinstance(given, list):
        return listed([_file(of) for of in given])
    return Path(str(given)).name or str(given)


def _how(subject: Subject) -> str:
    settings = subject.about.settings
    path, warmup = settings["path"], settings["warmup"]
    if path.along is not None:
        return "Both were scored along a path of training steps."
    after = ""
    if warmup.checkpoint:
        after = " at a checkpoint that was given"
    elif warmup.fraction:
        after = f" after a warm-up on {percent(warmup.fraction)} of the examples"
    return f"Both were scored with {_part(settings['scorer'])}{after}."


def _part(part: Part) -> str:
    """A class's name in words: first order."""
    return re.sub(r"(?<!^)(?=[A-Z])", " ", part.class_path.rpartition(".")[2]).lower()


def _examples(subject: Subject) -> str:
    examples, figures = subject.about.counts.examples, subject.selection.diagnostics.examples
    if examples.selected == examples.rows:
        return "All examples are taken."
    share = examples.selected / max(examples.rows, 1)
    one = examples.selected == 1
    text = f"{counted(examples.selected, 'example')} {'was' if one else 'were'} chosen ({percent(share)})"
    if figures.captured is not None:
        text += f"; {'it holds' if one else 'they hold'} {percent(figures.captured)} of the sum of all positive scores"
    return f"{text}{_sources(subject)}."


def _sources(subject: Subject) -> str:
    """The sources of most of the chosen, beside their shares of the pool."""
    sources = subject.selection.diagnostics.sources
    if sources is None or len(sources.groups) < 2:
        return ""
    rows, selected = (sum(getattr(g, side) for g in sources.groups) for side in ("rows", "selected"))
    most = sorted((g for g in sources.groups if g.name and g.selected), key=lambda g: -g.selected)[:_SHOWN_SOURCES]
    parts = [f"{percent(g.selected / selected)} are from {g.name} ({percent(g.rows / rows)} of the pool)" for g in most]
    return f". Of the chosen, {listed(parts)}" if parts else ""


def _weights(subject: Subject) -> str:
    weights, figures = subject.about.counts.parameters, subject.selection.diagnostics.parameters
    if weights.selected == weights.scored:
        return "All weights are taken."
    text = f"{weights.selected:,} weights were chosen ({percent(weights.selected / max(weights.scored, 1))})"
    if figures is not None and figures.captured is not None:
        text += f", with {percent(figures.captured)} of the weights' positive scores"
    return f"{text}."


def _cost(subject: Subject) -> str:
    phases = subject.about.phases
    if not phases:
        return ""
    seconds, peak = sum(p.seconds for p in phases), max(p.peak_memory_bytes for p in phases)
    return f"It took {duration(seconds)} and {memory(peak)} of memory at most."


def _cautions(subject: Subject) -> list[Block]:
    """What one should look at before training; of a control, that it is one."""
    control = subject.selection.manifest.get("control")
    if control is not None:
        drawn = ", ".join(f"{side}: {rule}" for side, rule in control.items())
        return [Text(f"A control: its choice was not made by the scores ({drawn}).", "caution")]
    return [Text(f"{text[:1].upper()}{text[1:]}", "caution") for text in cautions(subject.selection)]


def _unit(subject: Subject) -> list[Block]:
    """What scores are shown in."""
    told = "A score is the fall of the validation objective that a small step predicts"
    if subject.about.settings["normalize"] != "none" or subject.about.settings["path"].along is not None:
        told = "Scores are sums along a path, or normalised; see the settings"
    return [
        Text(f"{told}{f'; all scores here are in units of {subject.unit}' if subject.unit.exponent else ''}.", "note")
    ]


def _settings(subject: Subject) -> Table:
    about, of = subject.about, subject.about.settings
    warmup = of["warmup"]
    rows = [
        ("model", f"{about.model.name_or_path} ({about.model.dtype}, computed in {about.model.compute_dtype})"),
        ("pool", str(about.data.train.path)),
        ("scorer", _described(of["scorer"])),
        ("preconditioner", str(of["preconditioner"])),
        ("warm-up", _warmup(warmup)),
        ("prior's weight", number(of["prior"].weight)),
        ("order", f"{of['order']}, {counted(of['rounds'], 'round')}"),
        ("data budget", str(of["data_budget"])),
        ("data allocator", _described(of["data_allocator"])),
        ("parameter budget", str(of["parameter_budget"])),
        ("parameter allocator", _described(of["parameter_allocator"])),
        ("seed", str(about.seed)),
        ("versions", ", ".join(f"{name} {version}" for name, version in about.versions.items())),
    ]
    return Table("The settings", ["setting", "value"], rows, frozenset({1}), folded=True)


def _warmup(warmup: Any) -> str:
    if warmup.checkpoint:
        return f"the checkpoint {warmup.checkpoint}"
    return f"{percent(warmup.fraction)}, {counted(warmup.epochs, 'epoch')}" if warmup.fraction else "none"


def _described(part: Part) -> str:
    options = ", ".join(f"{name}={value}" for name, value in part.options.items())
    return f"{_part(part)}({options})"
