"""The same number of weights in every layer."""

from collections.abc import Mapping

from jaxtyping import Bool, Float
from torch import Tensor

from dualsft.allocators.base import ParameterAllocator
from dualsft.allocators.choice import By, Choice, check_by
from dualsft.allocators.groups import layer_of, layers


class UniformPerLayer(ParameterAllocator):
    """The same number of weights in every layer, the best of each.

    Trainable parameters outside of all layers (embeddings, final norm, head) count as one more layer, the last. Numbers
    differ by one at most, and the first layers get more, but a layer too small for its part is taken in full and leaves
    the rest to the others. Ties go to the first name, then the first
    index.

    Args:
        by: ``magnitude`` ranks by |φ|; ``signed`` by φ itself.
    """

    together = True

    def __init__(self, by: By = "magnitude") -> None:
        check_by("uniform_per_layer", by)
        self.by = by

    def allocate(self, scores: Mapping[str, Float[Tensor, "..."]], budget: int) -> dict[str, Bool[Tensor, "..."]]:
        """Exactly ``budget`` entries; see `ParameterAllocator.allocate`."""
        choice = Choice(scores, self.by)
        outside = [name for name in scores if layer_of(name) is None]
        groups = [*layers(scores), outside] if outside else layers(scores)
        choice.spread(groups, [1] * len(groups), budget)
        return choice.mask
