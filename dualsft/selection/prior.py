"""The settings of the prior term (`dualsft.objectives.prior`)."""

from dataclasses import dataclass

from dualsft.errors import UserError
from dualsft.objectives.prior import Confidence, SelfDistillation, check_prior


@dataclass(frozen=True)
class Prior:
    """The prior term of the objective.

    Args:
        weight: λ_prior, beside the validation loss's 1; 0 is none, the paper's release has 0.2.
        fraction: Share of the pool that anchors the model, drawn at random.
        temperature: τ, by which both models' logits are divided.
        confidence: How much an anchor counts: the same each (uniform), by the base model's largest probability
            (max_prob), or less the more uncertain the base model is (entropy_inv).
    """

    weight: float = 0.0
    fraction: float = 0.02
    temperature: float = 2.0
    confidence: Confidence = "max_prob"

    def __post_init__(self) -> None:
        check_prior("model.prior", self.weight, self.temperature, self.confidence)
        if not 0 < self.fraction <= 1:
            raise UserError(f"model.prior.fraction is {self.fraction}; give a share above 0 and up to 1.")

    def term(self) -> SelfDistillation:
        """The term of the objective with these settings."""
        return SelfDistillation(self.weight, self.fraction, self.temperature, self.confidence)
