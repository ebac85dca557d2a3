"""Whether the scores are right: beside plain autograd on the same device, and in bfloat16 beside float32."""

from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from numerics import autograd_pass, relative_error
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef

from dualsft.data.layout import Batch
from dualsft.matrix.pass_result import GradientPass
from dualsft.matrix.passes import gradient_pass
from dualsft.selection.passes import scoring_mode
from gpu_checks.models import build, full_batches, packed, padded, ragged
from gpu_checks.section import Figure, Scale

_WAYS = {"by product": False, "by gradient": True}
"""Way to the rows of linear layers -> whether it forms each example's weight gradient."""


def correctness(scale: Scale) -> Iterator[Figure]:
    """Σ|difference| / Σ|reference| of rows and columns, the reference being autograd over one example at a time."""
    for dtype in ("float64", "float32", "bfloat16"):
        model = build(scale.narrow, scale.device, dtype)
        longest = scale.lengths[0]
        examples = ragged(model, [longest - k for k in range(4)])
        u = _gradient(model, [padded(model, ragged(model, [longest] * 2, first=100))])
        for layout, batch in {"padded": padded(model, examples), "packed": packed(model, examples, 2)}.items():
            reference = autograd_pass(model, partial(from_batch, [batch]), directions=[u])
            for way, by_gradient in _WAYS.items():
                with patch("dualsft.matrix.linear_tap.by_gradient_pays", return_value=by_gradient):
                    found = _scores(model, [batch], u)
                yield Figure(f"rows, {dtype}, {layout}, {way}", relative_error([rows_of(found, reference)]))
                pairs = [(found.sums[name], total) for name, total in reference.sums.items()]
                yield Figure(f"columns, {dtype}, {layout}, {way}", relative_error(pairs))


def precision(scale: Scale) -> Iterator[Figure]:
    """The whole first-order chain in bfloat16, and under autocast, beside float32, from the same weights."""
    model = build(scale.shapes[0], scale.device)
    length = scale.lengths[0]
    number = max(2, scale.examples * length // scale.batch_tokens)
    pool, validation = (full_batches(model, scale.batch_tokens, length, n) for n in (number, 1))
    narrow, u = _chain(model, pool, validation)
    model = model.float()
    with torch.autocast(scale.device, torch.bfloat16):
        mixed, u_mixed = _chain(model, pool, validation)
    reference, u_reference = _chain(model, pool, validation)
    for name, found, direction in (("bfloat16", narrow, u), ("bfloat16 autocast", mixed, u_mixed)):
        one, other = rows_of(found, reference)
        yield Figure(f"{name}: Spearman of the examples' scores", float(spearman_corrcoef(one, other)))
        yield Figure(f"{name}: relative error of the examples' scores", relative_error([(one, other)]))
        error, size = 0.0, 0.0
        for part, total in reference.sums.items():
            score = u_reference[part] * total
            error += float((direction[part] * found.sums[part] - score).abs().sum())
            size += float(score.abs().sum())
        yield Figure(f"{name}: relative error of the weights' scores", error / size)


def _chain(model: Any, pool: list[Batch], validation: list[Batch]) -> tuple[GradientPass, dict[str, Tensor]]:
    u = _gradient(model, validation)
    return _scores(model, pool, u), u


def _gradient(model: Any, batches: list[Batch]) -> dict[str, Tensor]:
    with scoring_mode(model, checkpointing=False):
        return dict(gradient_pass(model, partial(from_batch, batches)).sums)


def _scores(model: Any, batches: list[Batch], u: dict[str, Tensor]) -> GradientPass:
    with scoring_mode(model, checkpointing=False):
        return gradient_pass(model, partial(from_batch, batches), directions=[u])


def rows_of(found: GradientPass, reference: GradientPass) -> tuple[Tensor, Tensor]:
    """The scores of both by example, in the reference's order."""
    ids = list(reference.rows[0])
    one, other = (torch.tensor([of.rows[0][i] for i in ids], dtype=torch.float64) for of in (found, reference))
    return one, other


def from_batch(batches: list[Batch], first: int) -> list[Batch]:
    """The batches from this one on, as a pass takes them."""
    return batches[first:]
