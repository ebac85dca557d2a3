"""From statistics to the direction u, one parameter at a time."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dualsft.errors import UserError
from dualsft.scorers import ParameterStatistics, Scorer
from dualsft.selection.moments import Moments
from dualsft.selection.warmup import EPS


@torch.no_grad()
def directions(
    model: nn.Module,
    scorer: Scorer,
    gradient: dict[str, Tensor],
    moments: Moments,
    step_size: float,
    num_examples: int,
    pool_sums: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """U for every trainable parameter; each v and ĉ is dropped from its mapping as soon as it has been used.

    Args:
        model: The model at the scoring checkpoint.
        scorer: The rule for u.
        gradient: v per parameter.
        moments: ĉ per parameter for P = 1/(sqrt(ĉ)+eps); empty for P = 1.
        step_size: η.
        num_examples: n.
        pool_sums: Σ_i g_i per parameter, for a scorer that needs ḡ.

    Raises:
        UserError: if a direction is not finite, or not of its parameter's shape.
    """
    chosen = {}
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        v = gradient.pop(name)
        p = moments.pop(name).sqrt_().add_(EPS).reciprocal_() if moments else torch.ones_like(v)
        mean = None if pool_sums is None else pool_sums[name] / num_examples
        u = scorer.direction(ParameterStatistics(name, weight, v, p, step_size, num_examples, mean))
        if not isinstance(u, Tensor) or u.shape != weight.shape or not bool(u.isfinite().all()):
            raise UserError(f"{type(scorer).__name__} gave {name} a direction that is not finite or not of its shape.")
        chosen[name] = u
    return chosen
