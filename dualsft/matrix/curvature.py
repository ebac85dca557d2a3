"""Products of the Hessian H = ∇²V(θ) with one direction d in weight space, without the Hessian.

    exact                H d = ∇_θ <∇V(θ), d>                        differentiates twice; fused attention cannot
    finite difference    H d = (∇V(θ + εd) − ∇V(θ − εd)) / 2ε        two passes of plain gradients, error of order ε²

Either is a sum over examples like the gradient itself and comes from the same passes (`passes.py`). The difference is
for models that cannot be differentiated twice. It needs weights in float32 or float64: added to bfloat16 weights, εd
is lost in their rounding.

Source: B. A. Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6 (1994).
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dualsft.errors import UserError, is_out_of_memory
from dualsft.matrix.passes import compute_dtype
from dualsft.models import PreTrainedModel
from dualsft.sharding.collectives import sum_of_shards
from dualsft.sharding.shards import full_tensor, is_shard, local_shard
from dualsft.sharding.unit_gather import unsharded

FULL_PRECISION = "compute in float32, or set the scorer's method to exact"
"""A remedy (see `UserError`)."""

_RELATIVE_STEP = {torch.float32: 5e-5, torch.float64: 1e-5}
"""ε‖d‖ / ‖θ‖: where the error by rounding of the gradients, divided by ε, is about the error of order ε². For float64
it is larger than that, as some float64 models compute norms in float32 all the same."""

_LARGEST_BEND = 0.1
"""Ratio of second to first difference above which a gradient counts as jumping; of order ε where it is smooth."""


class HessianVectorProduct:
    """A derivative for `dualsft.matrix.passes.gradient_pass`: each trainable parameter's ``grad`` becomes (∇² loss) d.

    Args:
        model: The model; when a loss is differentiated it must be `twice_differentiable`.
        direction: d per trainable parameter, of its (local) shape.

    Attributes:
        shards: The parameters of a sharded model, which must be unsharded in the pass; empty for any other model.
    """

    def __init__(self, model: nn.Module, direction: Mapping[str, Tensor]) -> None:
        self._model, self._direction = model, direction
        self.shards = {name: p for name, p in model.named_parameters() if is_shard(p)}
        self._full: Mapping[str, Tensor] | None = None if self.shards else direction

    def __call__(self, loss: Tensor) -> None:
        """Differentiate twice; refuse a model with an operation that has no second derivative."""
        if self._full is None:
            self._full = {name: full_tensor(d, self.shards[name]) for name, d in self._direction.items()}
        try:
            parameters = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
            first = torch.autograd.grad(loss, list(parameters.values()), create_graph=True, allow_unused=True)
            # a gradient that depends on no weight has no row in the Hessian
            gradients = {n: g for n, g in zip(parameters, first, strict=True) if g is not None and g.requires_grad}
            if gradients:
                along = [self._full[name].to(gradient.dtype) for name, gradient in gradients.items()]
                torch.autograd.backward(list(gradients.values()), along)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"The model cannot be differentiated twice ({reason}); set the scorer's method to finite_difference, "
                "or use another scorer."
            ) from error


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Give the model plain attention, as fused kernels have no second derivative, and unshard it, in this context."""
    with unsharded(model), sdpa_kernel(SDPBackend.MATH):
        yield


def check_differences(model: PreTrainedModel) -> None:
    """Refuse a finite difference along weights that are stored, or computed with, in half precision."""
    kinds = {p.dtype for p in model.parameters() if p.requires_grad} | {compute_dtype(model)}
    if half := sorted(str(kind).removeprefix("torch.") for kind in kinds if kind not in _RELATIVE_STEP):
        raise UserError(f"A finite difference of gradients drowns in the rounding of {half[0]}.", FULL_PRECISION)


def difference_step(model: nn.Module, direction: Mapping[str, Tensor]) -> float:
    """ε, chosen so that ‖εd‖ is a small share of ‖θ‖, both over all trainable weights; refuses a direction of zero."""
    weights = {name: p for name, p in model.named_parameters() if name in direction}
    share = max(_RELATIVE_STEP[p.dtype] for p in weights.values())
    length = _norm(direction.values())
    if length == 0:
        raise UserError("The pool's mean gradient is zero, so there is no step along it; check the pool.")
    return share * _norm(weights.values()) / length


def _norm(tensors: Iterable[Tensor]) -> float:
    """The norm of all shards together."""
    local = math.fsum(float(local_shard(tensor.detach()).double().square().sum()) for tensor in tensors)
    return math.sqrt(float(sum_of_shards(torch.tensor(local, dtype=torch.float64))))


def check_smooth(
    forward: Mapping[str, Tensor], backward: Mapping[str, Tensor], center: Mapping[str, Tensor], name: str
) -> None:
    """Check that the gradient is smooth at θ: that it changes as much ahead of θ as behind it.

    It is not smooth where the model switches, as a router that sends a token to another expert does: the difference
    then measures a jump, and the second difference is not small against the first.

    Args:
        forward: Σ_i g_i of the term of this name at θ + εd, by parameter name.
        backward: The same at θ − εd.
        center: The same at θ.
        name: The term's.
    """
    second = _norm(forward[n] + backward[n] - 2 * center[n] for n in center)
    first = _norm(forward[n] - backward[n] for n in center)
    if second > _LARGEST_BEND * first:
        raise UserError(
            f"The {name} gradient jumps between the two points of the finite difference (second difference "
            f"{second / first if first else math.inf:.2g} of the first), as with routed experts or kinks; set the "
            "scorer's method to exact."
        )


@contextmanager
def displaced(model: nn.Module, direction: Mapping[str, Tensor], step: float) -> Iterator[None]:
    """The model's weights are θ + step · d while the context is open; afterwards they are θ again, bit for bit."""
    weights = {name: local_shard(p.detach()) for name, p in model.named_parameters() if name in direction}
    before = {name: p.clone() for name, p in weights.items()}
    try:
        for name, weight in weights.items():
            weight.add_(direction[name].to(weight.dtype), alpha=step)
        yield
    finally:
        for name, weight in weights.items():
            weight.copy_(before[name])
