"""What is odd about a selection, in one sentence each."""

from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import numpy as np

from dualsft.selection.artifact import Selection
from dualsft.selection.diagnostics import Basis, Diagnostics, ScoreFigures
from dualsft.selection.diagnostics.examples import Rows

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


class Rule(NamedTuple):
    """What chose the examples.

    Attributes:
        name: The data allocator's class.
        passed_over: How many examples with positive scores it could have chosen and did not.
    """

    name: str = "TopK"
    passed_over: int = 0


def cautions(selection: Selection) -> Iterator[str]:
    """One sentence for each thing that a user should look at before training on the selection."""
    return cautions_on(selection.diagnostics, _rule(selection))


def cautions_on(found: Diagnostics, rule: Rule) -> Iterator[str]:
    """The cautions on figures; a choice that was drawn at random is not told to be unlike the scores or the target."""
    choice = (
        [] if rule.name == "RandomExamples" else [_harmful(found.examples, rule), _length(found), _mix(found, rule)]
    )
    return chain(_scores(found), *choice, _basis(found.basis))


def _rule(selection: Selection) -> Rule:
    rows, table = Rows(selection.examples), selection.examples
    free = rows.scored & ~rows.selected & (np.nan_to_num(rows.score) > 0)
    if "duplicate_of" in table.column_names:
        free &= table["duplicate_of"].is_null().to_numpy()
    name = selection.about.settings["data_allocator"].class_path.rpartition(".")[2]
    return Rule(name, int(free.sum()))


def _scores(found: Diagnostics) -> Iterator[str]:
    for side, figures in (("examples", found.examples), ("weights", found.parameters)):
        if figures is not None and (value := _only_value(figures)) is not None:
            what = "zero" if value == 0 else f"equal ({value:.3g})"
            yield f"all scores of the {side} are {what}, so that the choice among them means nothing; check the data."


def _only_value(figures: ScoreFigures) -> float | None:
    lowest, highest = figures.quantiles.get("0.0"), figures.quantiles.get("1.0")
    return lowest if lowest == highest and figures.scored > 1 else None


def _harmful(figures: ScoreFigures, rule: Rule) -> Iterator[str]:
    """Rows that are chosen although the scores speak against them; where all are taken, nothing was chosen.

    The budget is the reason only where it is larger than the number of positive scores.
    """
    against = figures.selected - figures.selected_positive
    if against and figures.selected < figures.scored:
        told = (
            f"{against:,} of the {figures.selected:,} chosen examples {'has' if against == 1 else 'have'} no positive "
            "score: to learn them is predicted not to lower the loss on the target"
        )
        if rule.passed_over:
            have = "1 that has one" if rule.passed_over == 1 else f"{rule.passed_over:,} that have one"
            yield f"{told}; {rule.name} took them and left {have}, so that not the budget but this rule is the reason."
        else:
            yield f"{told}; lower model.data_budget, or take model.data_allocator positive_only."


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
            "tokens), which order the examples much as sorting by length would; change model.normalize."
        )


def _mix(found: Diagnostics, rule: Rule) -> Iterator[str]:
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
        quota = rule.name == "PerSourceQuota"
        advice = "give per_source_quota other shares" if quota else "share the budget with per_source_quota"
        yield (
            f"the chosen examples come from other sources than the target's ({apart:.0%} of one mix would have to move "
            f"to make the other); look at some, or {advice}."
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
