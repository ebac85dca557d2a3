"""Floors for every layer and every kind of module, then the best of the rest. Source: arXiv 2605.06166."""

import math
from collections.abc import Mapping
from decimal import Decimal

from jaxtyping import Bool, Float
from torch import Tensor

from dualsft.allocators.base import ParameterAllocator
from dualsft.allocators.choice import By, Choice, check_by
from dualsft.allocators.groups import kinds, layers
from dualsft.errors import UserError


class LayerQuota(ParameterAllocator):
    """A part of the budget spread evenly over layers, a part over kinds of modules, the rest to the best of the model.

    The steps choose the best weights of each layer, then the best remaining ones of each kind (q, k, v, o, gate, up,
    down, other, by the name, see `dualsft.allocators.groups`), then the best remaining ones of the model. A layer or
    kind too small for its part leaves the rest to the others; a rest that none of them can take goes to the last step.
    Parts are rounded down to integers. Ties go to the first name, then the first index.

    Args:
        layer_share: Part of the budget that is spread evenly over the layers, in [0, 1].
        module_share: Part of the budget that is spread evenly over the kinds of modules that the model has, in [0, 1].
        by: ``magnitude`` ranks by |φ|, as the paper's release does; ``signed`` by φ itself.
    """

    together = True

    def __init__(self, layer_share: float = 0.2, module_share: float = 0.2, by: By = "magnitude") -> None:
        check_by("layer_quota", by)
        for key, share in (("layer_share", layer_share), ("module_share", module_share)):
            if not 0 <= share <= 1:
                raise UserError(f"{key} of layer_quota is {share}; give a part of the budget from 0 to 1.")
        if Decimal(str(layer_share)) + Decimal(str(module_share)) > 1:
            raise UserError(
                f"layer_share {layer_share} and module_share {module_share} of layer_quota add up to more than the "
                "budget; lower them until they add up to at most 1."
            )
        self.layer_share, self.module_share, self.by = layer_share, module_share, by

    def allocate(self, scores: Mapping[str, Float[Tensor, "..."]], budget: int) -> dict[str, Bool[Tensor, "..."]]:
        """Exactly ``budget`` entries; see `ParameterAllocator.allocate`."""
        choice, left = Choice(scores, self.by), budget
        for groups, share in ((layers(scores), self.layer_share), (kinds(scores), self.module_share)):
            left -= choice.spread(groups, [1] * len(groups), math.floor(Decimal(str(share)) * budget))
        choice.take(scores, left)
        return choice.mask
