"""What is odd about a selection, in one sentence each."""

from collections.abc import Iterator
from itertools import chain

from dualsft.selection.diagnostics import Basis, Diagnostics, ScoreFigures

FAR = 3.0
"""Ratio of median lengths from which they are told to be far apart."""
UNLIKE = 0.5
"""Total variation distance of source mixes, likewise."""
EXPLAINED, FEW_ROWS = 0.9, 20
"""Rank correlation of length and score, likewise, and the number of rows below which it says nothing."""
HANDFUL = 10
"""Steps of a warm-up that are enough."""
UNSTABLE = 0.2
"""Rank correlation of two halves below which chance is told to decide."""


def cautions(found: Diagnostics) -> Iterator[str]:
    """One sentence for each thing that a user should look at before training on the selection."""
    return chain(_scores(found), _harmful(found.examples), _length(found), _mix(found), _basis(found.basis))


def _scores(found: Diagnostics) -> Iterator[str]:
    for side, figures in (("examples", found.examples), ("weights", found.parameters)):
        if figures is not None and (value := _only_value(figures)) is not None:
            what = "zero" if value == 0 else f"equal ({value:.3g})"
            yield f"all scores of the {side} are {what}, so that the choice among them means nothing; check the data."


def _only_value(figures: ScoreFigures) -> float | None:
    lowest, highest = figures.quantiles.get("0.0"), figures.quantiles.get("1.0")
    return lowest if lowest == highest and figures.scored > 1 else None


def _harmful(figures: ScoreFigures) -> Iterator[str]:
    """Rows that are chosen although the scores speak against them; where all are taken, nothing was chosen."""
    against = figures.selected - figures.selected_positive
    if against and figures.selected < figures.scored:
        yield (
            f"{against:,} of the {figures.selected:,} chosen examples {'has' if against == 1 else 'have'} no positive "
            "score: to learn them is predicted not to lower the loss on the target; lower model.data_budget, or take "
            "model.data_allocator positive_only."
        )


def _length(found: Diagnostics) -> Iterator[str]:
    lengths, target = found.lengths, found.basis.target
    if lengths.selected and target is not None and target.tokens:
        chosen, due = lengths.selected["0.5"], target.tokens["0.5"]
        if max(chosen, due) >= FAR * min(chosen, due):
            yield (
                f"the chosen examples are much {'longer' if chosen > due else 'shorter'} than the target's (median "
                f"{chosen:,.0f} supervised tokens against {due:,.0f}); look at some, or change model.normalize."
            )
    if lengths.correlation is not None and found.examples.scored >= FEW_ROWS and abs(lengths.correlation) >= EXPLAINED:
        yield (
            f"length alone explains the scores (rank correlation {lengths.correlation:.2f} with the supervised "
            "tokens), so that sorting by length would choose much the same; change model.normalize."
        )


def _mix(found: Diagnostics) -> Iterator[str]:
    """The total variation distance of the sources' shares among the chosen and in the target, where they share any."""
    target = found.basis.target
    if found.sources is None or target is None or not target.sources:
        return
    chosen = {group.name: group.selected for group in found.sources.groups if group.name is not None}
    if not chosen.keys() & target.sources.keys():
        return
    sums = max(1, sum(chosen.values())), max(1, sum(target.sources.values()))
    names = {*chosen, *target.sources}
    apart = sum(abs(chosen.get(n, 0) / sums[0] - target.sources.get(n, 0) / sums[1]) for n in names) / 2
    if apart >= UNLIKE:
        yield (
            f"the chosen examples come from other sources than the target's ({apart:.0%} of one mix would have to move "
            "to make the other); look at some, or share the budget with per_source_quota."
        )


def _basis(basis: Basis) -> Iterator[str]:
    """What the scores rest on, and whether it bears them."""
    if basis.warmup_steps is not None and basis.warmup_steps < HANDFUL:
        steps = "a single optimizer step" if basis.warmup_steps == 1 else f"only {basis.warmup_steps} optimizer steps"
        yield (
            f"the warm-up took {steps}, too few to tell the scale of a weight's "
            "gradients; raise model.warmup.fraction or model.warmup.epochs, or lower data.batch_tokens."
        )
    agreed = basis.stability.examples if basis.stability else None
    if agreed is not None and agreed < UNSTABLE:
        yield (
            "two halves of the validation set hardly agree on the order of the examples (rank correlation "
            f"{agreed:.2f}), so that chance decides much of the choice; give data.validation more rows."
        )
