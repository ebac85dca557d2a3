"""A pass checks its rows against autograd on some of its own examples before it goes on to the others.

What an architecture may do wrong without a word, such as mixing examples of one batch, letting packed examples see one
another, or using a weight past its module, shows here: the row of an example in its batch must be <u, ∇l_i> of the same
example alone, where the gradient is autograd's own and its product with u is taken as each parameter's is complete.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dualsft.data.layout import Batch, Layout, one_example, to_device
from dualsft.errors import UserError
from dualsft.matrix.interaction import RowSums, check_covered
from dualsft.objectives import example_losses
from dualsft.sharding.shards import compute_device
from dualsft.sharding.unit_gather import unsharded_parameters

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_HALF_PRECISION_TOLERANCE = 5e-2  # of the size of what was added; up to 1.5e-2 has been seen on short examples
_BLOCK = 2**20
"""Entries that are multiplied at a time: copies of a large embedding would be the peak of the whole pass."""


def spot_check(
    model: PreTrainedModel,
    rows: RowSums,
    batch: Batch,
    found: Sequence[Sequence[float]],
    dtype: torch.dtype,
    turn: Callable[[], None] = lambda: None,
) -> None:
    """Compare the rows of some of a batch's examples with autograd over each alone.

    Args:
        model: The model, without hooks of ours.
        rows: What the batch was scored with.
        batch: The batch.
        found: Its rows, for each direction.
        dtype: The type that activations have, which decides how close they must be.
        turn: Waits, before each forward and backward, until other ranks are ready for it.

    Raises:
        UserError: if a parameter takes part that no tap has seen, or a row differs by more than rounding.
    """
    tolerance = _tolerance(dtype)
    for k in _telling(batch):
        turn()
        products = _products_alone(model, rows.directions, one_example(batch, k))
        check_covered(model, rows.covered, [name for name, (_, sizes) in products.items() if any(sizes)])
        for values, alone, scale in zip(found, *_added(products, len(rows.directions)), strict=True):
            if abs(values[k] - alone) <= tolerance * scale:
                continue
            packing = "; set data.packing to false" if "spans" in batch else ""
            raise UserError(
                f"{type(model).__name__} cannot be scored in batches: example {int(batch['example_id'][k])} scores "
                f"{values[k]:.6g} among others and {alone:.6g} alone (products of size {scale:.3g} were added, and "
                f"{tolerance:g} of that is allowed), so it mixes examples, or uses a weight past the module that "
                f"owns it{packing}."
            )


@torch.no_grad()
def check_packing(model: PreTrainedModel, batch: Batch, dtype: torch.dtype) -> None:
    """See that some examples of a packed batch have the losses there that they have alone.

    Args:
        model: The model; in evaluation mode for as long as it takes.
        batch: A packed batch; a padded one has nothing to check.
        dtype: The type that activations have, which decides how close the losses must be.

    Raises:
        UserError: if they do not, so that the model lets packed examples see one another.
    """
    if "spans" not in batch:
        return
    training = model.training
    model.eval()
    together = example_losses(model, to_device(batch, compute_device(model)))
    for k in _telling(batch):
        alone = example_losses(model, to_device(one_example(batch, k), compute_device(model)))[0]
        if not bool(together[k].isfinite()):  # spoilt by a neighbour that will be left out
            continue
        if not torch.isclose(together[k], alone, rtol=_tolerance(dtype), atol=_tolerance(dtype)):
            raise UserError(
                f"{type(model).__name__} lets packed examples see one another: example {int(batch['example_id'][k])} "
                f"has a loss of {together[k]:.6g} among others and {alone:.6g} alone; set data.packing to false."
            )
    model.train(training)


def _telling(batch: Batch) -> list[int]:
    """The first and the last example, and one behind another in its row, as the first of a row sees no other."""
    spans = Layout.of(batch).spans
    behind = [k for k, (_, first, _) in enumerate(spans) if first]
    return sorted({0, len(spans) - 1, *behind[-1:]})


def shares_rows(batch: Batch) -> bool:
    """Whether an example stands behind another in its row."""
    return any(first for _, first, _ in Layout.of(batch).spans)


def _tolerance(dtype: torch.dtype) -> float:
    return _TOLERANCE.get(dtype, _HALF_PRECISION_TOLERANCE)


def _products_alone(
    model: PreTrainedModel, directions: Sequence[Mapping[str, Tensor]], example: Batch
) -> dict[str, tuple[list[float], list[float]]]:
    """Parameter name -> <u, g> and Σ|u g| over that parameter for each u, of one example by itself."""
    products: dict[str, tuple[list[float], list[float]]] = {}

    def take(name: str, gradient: Tensor) -> None:
        found = [_product_and_size(gradient, u[name]) for u in directions]
        products[name] = ([product for product, _ in found], [size for _, size in found])

    with watched_gradients(model, directions[0], take):
        example_losses(model, to_device(example, compute_device(model))).sum().backward()
    return products


@contextmanager
def watched_gradients(
    model: PreTrainedModel, names: Collection[str], take: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Take each parameter's gradient, which is then dropped, as backward completes it, while the context is open.

    Args:
        model: The model; of a sharded one, the gradients are this rank's own.
        names: Of the parameters; those that are frozen require a gradient meanwhile.
        take: Gets a parameter's name, and its gradient.
    """
    scored = {name: p for name, p in model.named_parameters() if name in names}
    asked = {name: p.requires_grad for name, p in scored.items()}

    def taker(name: str) -> Callable[[Tensor], None]:
        def taking(parameter: Tensor) -> None:
            assert parameter.grad is not None
            take(name, parameter.grad)
            parameter.grad = None

        return taking

    for parameter in scored.values():
        parameter.requires_grad_(True)
    working = unsharded_parameters(model)
    handles = [working[name].register_post_accumulate_grad_hook(taker(name)) for name in scored]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in scored.items():
            parameter.grad = None
            parameter.requires_grad_(asked[name])


def _product_and_size(gradient: Tensor, u: Tensor) -> tuple[float, float]:
    product = size = 0.0
    pair = (gradient.flatten(), u.flatten())
    for g, part in zip(*(values.split(_BLOCK) for values in pair), strict=True):
        entries = g.double() * part
        product += float(entries.sum())
        size += float(entries.abs().sum())
    return product, size


def _added(products: Mapping[str, tuple[list[float], list[float]]], count: int) -> tuple[list[float], list[float]]:
    """<u, g> and Σ|u g| over all parameters, for each u."""
    values, sizes = ([of[part] for of in products.values()] for part in (0, 1))
    return [sum(of[k] for of in values) for k in range(count)], [sum(of[k] for of in sizes) for k in range(count)]
