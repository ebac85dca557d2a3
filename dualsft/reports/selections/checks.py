"""What a run checks of itself, how stable its order is, and what each phase cost."""

from dualsft.reports.blocks import Block, Table, Text
from dualsft.reports.selections.subject import Subject
from dualsft.reports.words import counted, duration, memory, number, percent


def checks(subject: Subject) -> list[Block]:
    """One row for each check, with what it means."""
    rows = [*_identity(subject), *_coverage(subject), *_step(subject), *_paths(subject), *_directions(subject)]
    note = (
        "Before its first pass, select also compares some examples' scores with plain autograd (spot check), and stops "
        "where they differ: this selection exists, so they did not."
    )
    return [Table("Checks", ["check", "found", "meaning"], rows, frozenset({1, 2})), Text(note, "note")]


def _identity(subject: Subject) -> list[list[str]]:
    found = subject.about.sum_identity
    if found is None:
        return [["sum identity", "–", "no weight was scored, so there are no sums to compare"]]
    ok = "holds" if found.relative_difference <= found.tolerance else "does not hold"
    sums = " and ".join(subject.shown(of, 6) for of in (found.row_sum, found.column_sum))
    sums = f"{ok}: {sums}, apart by {found.relative_difference:.1e} of the scores' size"
    return [["sum identity", sums, "the examples' scores and the weights' add up to the same"]]


def _coverage(subject: Subject) -> list[list[str]]:
    return [["coverage", percent(subject.about.coverage), "share of the model's weights that the scores cover"]]


def _step(subject: Subject) -> list[list[str]]:
    found = subject.about.prediction
    if found is None:
        return []
    rows = [["predicted improvement", f"{subject.shown(found.predicted_improvement)} at step {found.step_size:.3g}"]]
    rows[0].append("fall of the validation objective by one step on all of the pool")
    if found.second_order_share is not None:
        share = f"{number(found.second_order_share, 2)} of the first"
        rows.append(["second-order term", share, "how much the curvature changes the prediction"])
    return rows


def _paths(subject: Subject) -> list[list[str]]:
    rows = []
    for name, of in (subject.about.path_walked or {}).items():
        steps = f"{counted(len(of.steps) - 1, 'piece')}, {counted(of.walked_steps, 'step')}"
        rows.append([f"path to {name}", steps, "the training that scores were summed along"])
        for side, found in (("pool", of.pool), ("validation set", of.validation)):
            if found is not None:
                reached = "within" if found.reached else "only within"
                error = max(found.row_error, found.column_error or 0.0)
                rows.append(
                    [f"falls of the {side}", f"{reached} {error:.1%}", "how near scores are to the falls of losses"]
                )
    return rows


def _directions(subject: Subject) -> list[list[str]]:
    basis, rows = subject.selection.diagnostics.basis, []
    for name, of in basis.alignment.items():
        where = "" if len(basis.alignment) == 1 else f" ({name})"
        if of.validation_prior is not None:
            meaning = "whether target and prior pull the same way"
            rows.append([f"cosine of validation and prior{where}", f"{of.validation_prior:.2f}", meaning])
        if of.direction_pool is not None:
            meaning = "whether the pool as a whole teaches what is wanted"
            rows.append([f"cosine of u and the pool's gradient{where}", f"{of.direction_pool:.2f}", meaning])
    return rows


def stability(subject: Subject) -> list[Block]:
    """The order that two halves of the validation set give, and what the rounds changed; nothing if none is known."""
    blocks: list[Block] = []
    found = subject.selection.diagnostics.basis.stability
    if found is not None:
        sides = {"examples": found.examples, "weights": found.parameters}
        rows = [[side, "–" if value is None else f"{value:.2f}"] for side, value in sides.items()]
        caption = (
            "Rank correlation of the scores that two halves of the validation set give: 1 is the same order, 0 chance"
        )
        blocks.append(Table(caption, ["side", "rank correlation"], rows))
    return [*blocks, *_rounds(subject)]


def _rounds(subject: Subject) -> list[Block]:
    rounds = subject.about.rounds
    if len(rounds) < 2:
        return []
    counts = subject.about.counts
    chance = [percent(of.selected / max(of.scored, 1)) for of in (counts.examples, counts.parameters)]
    rows = [["by chance", *chance]]
    for of in rounds[1:]:
        kept = (of.data.overlap, of.parameters.overlap)
        rows.append([str(of.round), *("–" if share is None else percent(share) for share in kept)])
    return [
        Table("Share of each round's choice that the round before had made too", ["round", "examples", "weights"], rows)
    ]


def costs(subject: Subject) -> list[Block]:
    """Time, speed and memory of each phase, and of all."""
    phases = subject.about.phases
    rows = [
        [
            of.name,
            f"{of.examples:,}",
            f"{of.tokens:,}",
            duration(of.seconds),
            f"{of.tokens_per_second:,.0f}",
            memory(of.peak_memory_bytes),
        ]
        for of in phases
    ]
    if len(phases) > 1:
        total = duration(sum(of.seconds for of in phases))
        rows.append(["all", "", "", total, "", memory(max(of.peak_memory_bytes for of in phases))])
    head = ["phase", "examples", "supervised tokens", "time", "tokens per second", "peak memory"]
    return [Table("Time and memory by phase", head, rows)] if rows else []
