"""A direction u in two precisions, so that a pass holds no more of it than it uses.

Rows are products in the type of the weights' gradients: a float32 u would be rounded to it at every use. The scores of
the weights, u_j Σ_i g_ij, take u as it was before, one parameter at a time.
"""

from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn

from dualsft.errors import UserError
from dualsft.models.dtypes import accumulator_dtype, direction_dtype
from dualsft.models.lazy import LazyTensors
from dualsft.sharding.shards import shard_of

_REPEATED = 1e-2
"""Share of Σ|u| within which u must be the same when it is made again; rounding to bfloat16 moves less than half."""


class HeldDirection:
    """u in two precisions: rounded in memory for a pass, and exact for the scores of the weights, one at a time.

    Args:
        u: Parameter name -> u, as accurate as it is known; each tensor may be made when it is read.
        model: The model that is scored.

    Attributes:
        held: u in the type that rows are computed in (`direction_dtype`).
        exact: u in the type of sums. What was rounded is read from ``u`` again, at every use; it is refused if it has
            become another direction.
    """

    def __init__(self, u: Mapping[str, Tensor], model: nn.Module) -> None:
        self.held = {name: part.to(direction_dtype(model.get_parameter(name))) for name, part in u.items()}
        # not a method of this object: a circle of references would hold it, and open files, for longer than it is used
        self.exact = LazyTensors(self.held, partial(_exact, u, self.held))


def _exact(u: Mapping[str, Tensor], rounded: Mapping[str, Tensor], name: str) -> Tensor:
    """u of a parameter as it was before rounding."""
    held = rounded[name]
    wide = accumulator_dtype(held)
    if held.dtype == wide:
        return held
    exact = u[name].to(wide)
    if not bool((exact - held).abs_().sum() <= _REPEATED * exact.abs().sum()):
        raise UserError(
            f"The direction of {name} is another one when it is computed again; a scorer or a path must give the "
            "same direction for the same statistics, so give its random numbers a seed."
        )
    return exact


def masked(u: Mapping[str, Tensor], mask: Mapping[str, Tensor], model: nn.Module) -> LazyTensors:
    """u ⊙ m, made when it is read; parameters without a chosen weight are left out, so that no tap is placed on them.

    If the model is sharded, u has this rank's shards and the mask full shapes.
    """

    def make(name: str) -> Tensor:
        part = u[name]
        return part * shard_of(mask[name], model.get_parameter(name)).to(part.device)

    return LazyTensors([name for name, chosen in mask.items() if bool(chosen.any())], make)
