"""A pass checks its rows against autograd on two of its own examples before it goes on to the others.

What an architecture may do wrong without a word, such as mixing examples of one batch, letting packed examples see one
another, or using a weight past its module, shows here: the row of an example in its batch must be <u, ∇l_i> of the same
example alone, where the gradient is autograd's own and its product with u is taken as each parameter's is complete.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dualsft.errors import UserError
from dualsft.interaction import RowSums, check_covered
from dualsft.layout import Batch, only
from dualsft.objective import example_losses

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_HALF_PRECISION_TOLERANCE = 2e-2


def spot_check(model: PreTrainedModel, rows: RowSums, batch: Batch, found: Sequence[float], dtype: torch.dtype) -> None:
    """Compare the rows of a batch's first and last example with autograd over each alone.

    Args:
        model: The model, without hooks of ours.
        rows: What the batch was scored with.
        batch: The batch.
        found: Its rows.
        dtype: The type that activations have, which decides how close they must be.

    Raises:
        UserError: if a parameter takes part that no tap has seen, or a row differs by more than rounding.
    """
    tolerance = _TOLERANCE.get(dtype, _HALF_PRECISION_TOLERANCE)
    for k in sorted({0, len(found) - 1}):
        products, sizes = _products_alone(model, rows.direction, only(batch, k))
        check_covered(model, rows.covered, [name for name, size in sizes.items() if size])
        alone, scale = sum(products.values()), sum(sizes.values())
        if not abs(found[k] - alone) <= tolerance * scale:
            packing = "; set data.packing to false" if "spans" in batch else ""
            raise UserError(
                f"{type(model).__name__} cannot be scored in batches: example {int(batch['example_id'][k])} scores "
                f"{found[k]:.6g} among others and {alone:.6g} alone (products of size {scale:.3g} were added, and "
                f"{tolerance:g} of that is allowed), so it mixes examples, or uses a weight past the module that "
                f"owns it{packing}."
            )


def _products_alone(
    model: PreTrainedModel, direction: Mapping[str, Tensor], example: Batch
) -> tuple[dict[str, float], dict[str, float]]:
    """Parameter name -> <u, g> and Σ|u g| over that parameter, of one example by itself."""
    scored = {name: p for name, p in model.named_parameters() if name in direction}
    products: dict[str, float] = {}
    sizes: dict[str, float] = {}

    def taker(name: str) -> Callable[[Tensor], None]:
        def take(parameter: Tensor) -> None:
            assert parameter.grad is not None
            entries = parameter.grad.to(direction[name].dtype) * direction[name]
            products[name] = float(entries.sum(dtype=torch.float64))
            sizes[name] = float(entries.abs().sum(dtype=torch.float64))
            parameter.grad = None

        return take

    asked = {name: p.requires_grad for name, p in scored.items()}
    handles = [_require(p).register_post_accumulate_grad_hook(taker(name)) for name, p in scored.items()]
    try:
        batch = {name: values.to(model.device) for name, values in example.items()}
        example_losses(model, batch).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in scored.items():
            parameter.requires_grad_(asked[name])
    return products, sizes


def _require(parameter: nn.Parameter) -> nn.Parameter:
    parameter.requires_grad_(True)
    return parameter
