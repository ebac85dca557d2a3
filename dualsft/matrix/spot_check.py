"""Comparison of rows with autograd, on some of a pass's own examples, before the pass goes on to the others.

An architecture may mix the examples of a batch, let packed examples see one another, or use a weight without calling
its module, and raise no error. So the row of an example in its batch must be <u, ∇l_i> of the same example alone, where
the gradient is autograd's own and its product with u is computed as soon as each parameter's gradient is complete.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dualsft.data.layout import Batch, Layout, one_example, to_device
from dualsft.errors import UserError
from dualsft.matrix.placement import requires_grad
from dualsft.matrix.rows import Rows
from dualsft.models import PreTrainedModel
from dualsft.objectives import example_losses
from dualsft.sharding.shards import compute_device
from dualsft.sharding.unit_gather import unsharded_parameters

NO_PACKING = "do not pack examples"
"""A remedy (see `UserError`)."""

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_HALF_PRECISION_TOLERANCE = 5e-2  # relative to the terms' size; up to 1.5e-2 has been seen on short examples
_BLOCK = 2**20
"""Entries that are multiplied at a time: copies of a large embedding would be the peak of the whole pass."""


def spot_check(
    model: PreTrainedModel,
    rows: Rows,
    batch: Batch,
    scores: Sequence[Sequence[float]],
    dtype: torch.dtype,
    wait: Callable[[], None],
) -> None:
    """Compare the rows of some of a batch's examples with autograd over each alone.

    Args:
        model: The model, without taps.
        rows: The accumulator of the taps.
        batch: The batch.
        scores: Its row sums, for each direction.
        dtype: The activations' type, which decides how close the rows must be.
        wait: Returns, before each forward and backward, when other ranks are ready for it.

    Raises:
        UserError: if a parameter takes part that no tap has seen, or a row differs by more than rounding.
    """
    directions, tolerance = rows.directions, _TOLERANCE.get(dtype, _HALF_PRECISION_TOLERANCE)
    for k in _examples_to_check(batch):
        wait()
        products = _products_alone(model, directions, one_example(batch, k))
        check_covered(model, rows.covered, [name for name, found in products.items() if found[:, 1].any()])
        totals = sum(products.values(), torch.zeros(len(directions), 2, dtype=torch.float64))
        for among, (alone, scale) in zip(scores, totals.tolist(), strict=True):
            if abs(among[k] - alone) <= tolerance * scale:
                continue
            raise UserError(
                f"{type(model).__name__} cannot be scored in batches: example {int(batch['example_id'][k])} scores "
                f"{among[k]:.6g} among others and {alone:.6g} alone (products of size {scale:.3g} were added, and "
                f"{tolerance:g} of that is allowed), so it mixes examples, or uses a weight past the module that "
                "owns it.",
                NO_PACKING if "spans" in batch else "",
            )


def check_covered(model: nn.Module, covered: set[str], moved: Iterable[str]) -> None:
    """Check that parameters whose gradient is not zero (moved) are in modules that have been tapped (covered)."""
    if missed := [name for name in moved if name not in covered]:
        kinds = {type(model.get_submodule(n.rpartition(".")[0])).__name__ for n in missed}
        raise UserError(
            f"These parameters are used outside their own module's forward ({', '.join(sorted(kinds))}), so the "
            f"example scores would miss them: {', '.join(missed[:5])}; freeze them (requires_grad=False) or call "
            "the module that owns them."
        )


@torch.no_grad()
def check_packing(model: PreTrainedModel, batch: Batch, dtype: torch.dtype) -> None:
    """Check that some examples of a packed batch have the same losses as alone, in evaluation mode.

    Args:
        model: The model.
        batch: Packed; a padded one has nothing to check.
        dtype: The activations' type, which decides how close the losses must be.

    Raises:
        UserError: if the model lets packed examples see one another.
    """
    if "spans" not in batch:
        return
    training, tolerance = model.training, _TOLERANCE.get(dtype, _HALF_PRECISION_TOLERANCE)
    model.eval()
    together = example_losses(model, to_device(batch, compute_device(model)))
    for k in _examples_to_check(batch):
        alone = example_losses(model, to_device(one_example(batch, k), compute_device(model)))[0]
        if not bool(together[k].isfinite()):  # by itself or by a neighbour: the pass will see, and leave that one out
            continue
        if not torch.isclose(together[k], alone, rtol=tolerance, atol=tolerance):
            raise UserError(
                f"{type(model).__name__} lets packed examples see one another: example {int(batch['example_id'][k])} "
                f"has a loss of {together[k]:.6g} among others and {alone:.6g} alone.",
                NO_PACKING,
            )
    model.train(training)


def _examples_to_check(batch: Batch) -> list[int]:
    """The first example, the last, and one that follows another in its row, as a row's first example sees no other."""
    spans = Layout.of(batch).spans
    behind = [k for k, (_, first, _) in enumerate(spans) if first]
    return sorted({0, len(spans) - 1, *behind[-1:]})


def _products_alone(
    model: PreTrainedModel, directions: Sequence[Mapping[str, Tensor]], example: Batch
) -> dict[str, Float[Tensor, "direction 2"]]:
    """Parameter name -> <u, g> and Σ|u g| over that parameter for each u, of one example by itself."""
    products = {}

    def multiply(name: str, gradient: Tensor) -> None:
        products[name] = torch.zeros(len(directions), 2, dtype=torch.float64)
        for found, u in zip(products[name], directions, strict=True):
            pair = (gradient.flatten(), u[name].flatten())
            for g, part in zip(*(values.split(_BLOCK) for values in pair), strict=True):
                entries = g.double() * part
                found += torch.stack([entries.sum(), entries.abs().sum()]).cpu()

    with watched_gradients(model, directions[0], multiply):
        example_losses(model, to_device(example, compute_device(model))).sum().backward()
    return products


@contextmanager
def watched_gradients(
    model: PreTrainedModel, names: Collection[str], watch: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call ``watch`` with each named parameter and its gradient when backward has completed it, and drop the gradient.

    Frozen parameters require a gradient while the context is open; those of a sharded model are this rank's own.
    """
    scored = {name: p for name, p in model.named_parameters() if name in names}

    def watch_and_drop(name: str, parameter: Tensor) -> None:
        if parameter.grad is not None:  # compiled code calls the hooks of weights that took no part too
            watch(name, parameter.grad)
            parameter.grad = None

    with requires_grad(scored.values(), True):
        unsharded = unsharded_parameters(model)
        handles = [unsharded[name].register_post_accumulate_grad_hook(partial(watch_and_drop, name)) for name in scored]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter in scored.values():
                parameter.grad = None
