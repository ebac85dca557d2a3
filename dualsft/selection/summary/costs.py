"""The checks that a selection passed, its costs, and the tokens that tell most."""

from transformers import PreTrainedTokenizerBase

from dualsft.selection.artifact import Selection
from dualsft.selection.diagnostics import Diagnostics
from dualsft.selection.manifest import Manifest

_SHOWN_EXAMPLES, _SHOWN_TOKENS = 3, 5


def checks(selection: Selection) -> list[str]:
    """Both sums, the batches, the cosines, and what is told of the step, a path and rounds."""
    m = selection.about
    identity = m.sum_identity
    return [
        *(
            [
                f"sums        rows {identity.row_sum:.6g}, columns {identity.column_sum:.6g} "
                f"(difference {identity.relative_difference:.1e} of the scores' size)"
            ]
            if identity
            else []
        ),
        f"batches     {'packed' if m.data.packing else 'padded'} to {m.scoring_batch_tokens:,} tokens, "
        f"{m.data.padding_share:.1%} padding",
        *_cosines(selection.diagnostics),
        *_stability(selection.diagnostics),
        *_prediction(m),
        *_paths(m),
        *_rounds(m),
    ]


def phase_table(m: Manifest) -> list[str]:
    """One line for each phase."""
    width = max([21, *(len(phase.name) for phase in m.phases)])
    return [
        f"{phase.name:<{width}} {phase.examples:>8,} examples {phase.seconds:>8.1f} s "
        f"{phase.tokens_per_second:>10,.0f} supervised tokens/s {phase.peak_memory_bytes / 2**20:>8,.0f} MiB peak"
        for phase in m.phases
    ]


def _cosines(found: Diagnostics) -> list[str]:
    """How the directions lie to each other, where a pass gave them."""
    lines = []
    for name, of in found.basis.alignment.items():
        parts = {
            "direction u and mean gradient of the pool": of.direction_pool,
            "gradients of target and prior": of.validation_prior,
        }
        told = "; ".join(f"{what} {cosine:.2f}" for what, cosine in parts.items() if cosine is not None)
        several = f" for {name}" if len(found.basis.alignment) > 1 else ""
        lines += [f"cosines     {told}{several}"] if told else []
    return lines


def _stability(found: Diagnostics) -> list[str]:
    """How far two halves of the validation set agree, if they were asked."""
    stability = found.basis.stability
    if stability is None:
        return []
    sides = {"examples": stability.examples, "weights": stability.parameters}
    told = ", ".join(f"{value:.2f} of the {side}" for side, value in sides.items() if value is not None)
    return [f"stability   rank correlation of the scores by two halves of the validation set: {told or 'none'}"]


def _prediction(m: Manifest) -> list[str]:
    """The step, and the predicted improvement."""
    if m.prediction is None:
        return []
    line = f"step        {m.prediction.step_size:.3g}, predicted improvement {m.prediction.predicted_improvement:.3g}"
    if m.prediction.second_order_share is not None:
        line += f" (second-order term {m.prediction.second_order_share:.2g} of the first)"
    return [line]


def _paths(m: Manifest) -> list[str]:
    """Where each path ends, and how near the scores are to the falls of the losses."""
    lines = []
    for name, of in (m.path_walked or {}).items():
        pieces = len(of.steps) - 1
        line = f"path        {pieces} piece{'' if pieces == 1 else 's'}"
        line += f" to step {of.steps[-1]} of {of.walked_steps}" if of.walked_steps else ""
        line += f" to {name}" if len(m.path_walked or {}) > 1 else ""
        for side, found in (("pool", of.pool), ("validation set", of.validation)):
            if found is not None:
                error = max(found.row_error, found.column_error or 0.0)
                line += (
                    f"; {side}'s falls within {error:.1%}"
                    if found.reached
                    else (f"; {side}'s falls only within {error:.1%} of {found.tolerance:.1%} asked for")
                )
        lines.append(line)
    return lines


def _rounds(m: Manifest) -> list[str]:
    """The share of either choice that each later round kept."""
    lines = []
    for record in m.rounds[1:]:
        sides = {"parameters": record.parameters.overlap, "data": record.data.overlap}
        kept = ", ".join(f"{overlap or 0:.1%} of the {side}" for side, overlap in sides.items())
        lines.append(f"round {record.round:<5} chose {kept} as the round before")
    return lines


def telling_tokens(selection: Selection, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokens that contribute most to the best examples, with their shares of the example's score."""
    if selection.token_scores is None:
        return []
    rows = sorted(selection.token_scores.to_pylist(), key=lambda row: -sum(row["score"]))[:_SHOWN_EXAMPLES]
    lines = ["tokens      that contribute most to the best examples, each with its share of the example's score"]
    for row in rows:
        total = sum(row["score"])
        best = sorted(zip(row["score"], row["token_id"], strict=True), reverse=True)[:_SHOWN_TOKENS]
        spelt = "  ".join(f"{tokenizer.decode([token])!r} {score / total:.0%}" for score, token in best if score > 0)
        lines.append(f"  example {row['example_id']:,} ({total:.3g})  {spelt}")
    return lines
