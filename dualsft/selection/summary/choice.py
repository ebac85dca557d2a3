"""What was chosen, in a line each: examples, lengths, sources, weights and their places."""

from collections.abc import Callable, Iterable, Sequence

from dualsft.selection.artifact import Selection
from dualsft.selection.diagnostics import ALL, PlaceCounts, ScoreFigures, by_place
from dualsft.selection.diagnostics.parameters import tensors_of
from dualsft.selection.summary.text import one_line

_SHOWN = 3
"""Sources, layers or kinds that are named."""


def described_choice(selection: Selection) -> list[str]:
    """The lines of both sides, the most telling first."""
    return [_examples(selection), *_lengths(selection), *_sources(selection), _weights(selection), *_places(selection)]


def _examples(selection: Selection) -> str:
    counts, found = selection.about.counts.examples, selection.diagnostics
    left_out = "".join(f", {count:,} {why}" for why, count in _left_out(selection).items())
    line = f"examples    {counts.selected:,} of {counts.rows:,} selected ({counts.scored:,} scored{left_out})"
    if not 0 < counts.selected < counts.scored:
        return line
    tokens = found.lengths.selected_tokens / max(1, found.lengths.pool_tokens)
    captured = found.examples.captured
    held = f"{captured:.0%} of the positive score with " if captured is not None else ""
    return f"{line}: they hold {held}{tokens:.0%} of the supervised tokens{_next_budget(found.examples)}"


def _next_budget(figures: ScoreFigures) -> str:
    """What the best examples of twice the budget, or of the next smaller one that is known, would hold."""
    found = figures.best(2 * figures.selected)
    if found is None or not figures.selected < found.number < figures.scored:
        return ""
    share = found.number / figures.scored
    return f"; the best {found.number:,} ({share:.0%}) would hold {found.captured:.0%} of that score"


def _left_out(selection: Selection) -> dict[str, int]:
    """Reason why examples could not be chosen -> their number."""
    left_out = {
        **{status: n for status, n in selection.about.data.train.status.items() if status != "ok"},
        "nonfinite": selection.examples["status"].to_pylist().count("nonfinite"),
        "near-duplicates": selection.about.counts.examples.near_duplicates,
    }
    return {why: count for why, count in left_out.items() if count}


def _lengths(selection: Selection) -> list[str]:
    """The median lengths of chosen, pool and target."""
    found, target = selection.diagnostics.lengths, selection.diagnostics.basis.target
    sides = {"the chosen": found.selected, "the pool": found.pool, "the target": target.tokens if target else {}}
    told = ", ".join(f"{of['0.5']:,.0f} of {who}" for who, of in sides.items() if of)
    return [f"lengths     median {told} (supervised tokens)"] if told else []


def _sources(selection: Selection) -> list[str]:
    """The largest sources among the chosen, each with its share of the chosen and of the pool."""
    found = selection.diagnostics.sources
    if found is None or len(found.groups) < 2:
        return []
    chosen, scored = (sum(getattr(g, side) for g in found.groups) for side in ("selected", "scored"))
    groups = sorted(found.groups, key=lambda group: -group.selected)[:_SHOWN]
    told = ", ".join(
        f"{_name(group.name)} {group.selected / max(1, chosen):.0%} of the chosen "
        f"({group.scored / max(1, scored):.0%} of the pool)"
        for group in groups
    )
    return [f"sources     {told}{_more(len(found.groups))}"]


def _name(name: str | None) -> str:
    return "others" if name is None else one_line(name, 30) or "unnamed"


def _more(count: int) -> str:
    return f", and {count - _SHOWN:,} more" if count > _SHOWN else ""


def _weights(selection: Selection) -> str:
    counts, together = selection.about.counts.parameters, selection.diagnostics.parameters
    line = (
        f"weights     {counts.selected:,} of {counts.scored:,} selected "
        f"({counts.selected / counts.scored:.1%}; {selection.about.coverage:.0%} covered by the scores)"
    )
    if together is None or together.captured is None or counts.selected == counts.scored:
        return line
    return f"{line}: they hold {together.captured:.0%} of the positive score"


def _places(selection: Selection) -> list[str]:
    """The layers and the kinds of modules of which the largest share is chosen."""
    counts = selection.about.counts.parameters
    if counts.selected == counts.scored:
        return []
    places = by_place(tensors_of(selection.parameters))
    layers = _densest([of for of in places if of.kind == ALL], _layer)
    kinds = _densest(_by_kind(of for of in places if of.kind != ALL), lambda of: of.kind)
    return [f"places      densest {layers}; of modules in {kinds}"]


def _layer(of: PlaceCounts) -> str:
    return "outside of layers" if of.layer is None else f"in layer {of.layer}"


def _by_kind(places: Iterable[PlaceCounts]) -> list[PlaceCounts]:
    """The places of a kind in all layers as one."""
    found: dict[str, PlaceCounts] = {}
    for of in places:
        before = found.get(of.kind, PlaceCounts(None, of.kind, 0, 0, None))
        found[of.kind] = PlaceCounts(None, of.kind, before.size + of.size, before.selected + of.selected, None)
    return list(found.values())


def _densest(places: Sequence[PlaceCounts], name: Callable[[PlaceCounts], str]) -> str:
    best = sorted(places, key=lambda of: -of.density)[:_SHOWN]
    return ", ".join(f"{name(of)} ({of.density:.1%})" for of in best if of.selected)
