"""The gain that a selection's scores predict for a variant of it.

Restricted training on examples S with weights m moves θ by about −Σ_t lr_t m ⊙ P ⊙ ḡ_S, with ḡ_S the mean over S, so
the predicted improvement of V is, with M_ij made for a step of size η on the mean over n examples,

    (Σ_t lr_t / η) (n / |S|) Σ_{i∈S} Σ_{j∈m} M_ij

The sums over one side are exact where the other is held: scores of the pool's n examples by the weights m alone (order
``parameters_then_data``), and scores of the weights by the examples S alone (``data_then_parameters``, where n = |S|).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dualsft.experiments.audit_plan import Variation
from dualsft.experiments.variants import Draw, examples_of, weights_of
from dualsft.selection import Selection


@dataclass(frozen=True)
class Scored:
    """One scorer's scores for an audit.

    Attributes:
        rows: The selection whose scores of examples are sums over the audited selection's weights alone.
        columns: Draw of examples, by `key_of` -> the selection whose scores of weights are sums over these alone.
        exact: Whether they are; along a path they are the selection's own scores, whose sums rank variants and no more.
    """

    rows: Selection
    columns: Mapping[str, Selection]
    exact: bool

    @property
    def step_size(self) -> float:
        """η."""
        prediction = self.rows.about.prediction
        return prediction.step_size if prediction is not None else 1.0


def key_of(draw: Draw) -> str:
    """A draw as a text."""
    return ",".join(f"{name}={value}" for name, value in sorted(draw.items()))


def predicted_gains(audited: Selection, scored: Scored, drawn: Sequence[Variation]) -> list[float]:
    """The predicted gain of each variant, per unit of Σ_t lr_t, in nats of the validation objective."""
    table = scored.rows.examples.to_pydict()
    rows = {i: score for i, score in zip(table["example_id"], table["score"], strict=True) if score is not None}
    of_data = {
        k: _row_mean(audited, rows, one.variant["examples"]) for k, one in enumerate(drawn) if one.side == "data"
    }
    of_weights = _column_sums(audited, scored, {k: one for k, one in enumerate(drawn) if one.side != "data"})
    return [(of_data | of_weights)[k] / scored.step_size for k in range(len(drawn))]


def _row_mean(audited: Selection, rows: Mapping[int, float], draw: Draw) -> float:
    """n / |S| Σ_{i∈S} φ_i."""
    examples = examples_of(audited, draw)
    return len(rows) / len(examples) * sum(rows[i] for i in examples)


def _column_sums(audited: Selection, scored: Scored, drawn: Mapping[int, Variation]) -> dict[int, float]:
    """Σ_{j∈m} φ_j of each variant's mask, by the variant's number; the scores of one set of examples at a time."""
    found: dict[int, float] = {}
    for key in dict.fromkeys(key_of(one.variant["examples"]) for one in drawn.values()):
        scores = scored.columns[key].parameter_scores()
        for number, one in drawn.items():
            if key_of(one.variant["examples"]) == key:
                mask = weights_of(audited, one.variant["weights"])
                found[number] = sum(float(scores[name][part].sum(dtype=torch.float64)) for name, part in mask.items())
    return found
