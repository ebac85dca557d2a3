"""The prior term of V(θ) = mean validation loss + λ_prior prior(θ), which keeps what the base model knew."""

from dataclasses import dataclass

from dualsft.errors import UserError


@dataclass(frozen=True)
class Prior:
    """The prior term.

    Args:
        weight: λ_prior; 0 is none, the only value that can be scored so far.
    """

    weight: float = 0.0

    def __post_init__(self) -> None:
        if self.weight != 0:
            raise UserError(
                f"model.prior.weight is {self.weight}, but the prior term cannot be scored yet; set it to 0."
            )
