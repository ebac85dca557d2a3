"""A selection in figures, for loggers: what was chosen, how sound the scores are, and what each phase cost."""

from dualsft.selection.manifest import Manifest


def logged(about: Manifest) -> dict[str, float]:
    """Name -> number; what a selection does not have is left out. Phases of one name are added up."""
    examples, weights = about.counts.examples, about.counts.parameters
    identity, prediction = about.sum_identity, about.prediction
    found: dict[str, float | None] = {
        "examples/selected": examples.selected,
        "examples/scored": examples.scored,
        "examples/rows": examples.rows,
        "weights/selected": weights.selected,
        "weights/scored": weights.scored,
        "coverage": about.coverage,
        "padding_share": about.data.padding_share,
        "sum_identity/relative_difference": identity.relative_difference if identity else None,
        "prediction/step_size": prediction.step_size if prediction else None,
        "prediction/predicted_improvement": prediction.predicted_improvement if prediction else None,
    }
    for name in dict.fromkeys(phase.name for phase in about.phases):
        phases = [phase for phase in about.phases if phase.name == name]
        seconds = sum(phase.seconds for phase in phases)
        found[f"{name}/seconds"] = seconds
        found[f"{name}/tokens_per_second"] = sum(phase.tokens for phase in phases) / seconds if seconds else None
        found[f"{name}/peak_memory_bytes"] = max(phase.peak_memory_bytes for phase in phases)
    return {name: float(value) for name, value in found.items() if value is not None}
