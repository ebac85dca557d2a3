"""The batches that phases work on, as functions that can be traced: each holds what its phase holds."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dualsft.data.layout import Layout
from dualsft.matrix.curvature import HessianVectorProduct, twice_differentiable
from dualsft.matrix.interaction import ColumnSums, RowSums
from dualsft.matrix.placement import requires_grad
from dualsft.models import PreTrainedModel
from dualsft.models.dtypes import accumulator_dtype, direction_dtype
from dualsft.models.linear import is_linear
from dualsft.models.loading import checkpoint_activations
from dualsft.objectives import SelfDistillation, example_losses
from dualsft.objectives.base_logits import BaseLogits
from dualsft.plans.batch import BatchShape
from dualsft.plans.shape import ModelShape
from dualsft.selection.passes import scoring_mode
from dualsft.sharding.shard_model import transformer_blocks
from dualsft.training.chosen_gradient import ChosenGradientHook, Columns, Rectangle
from dualsft.training.compact import CompactParameters

Work = Callable[[], None]
_PRIOR = SelfDistillation(weight=1.0, fraction=1.0, temperature=2.0, confidence="max_prob")


@dataclass(frozen=True)
class Running:
    """How the model runs: whether activations are recomputed, and whether it computes in bfloat16 by autocast."""

    checkpointing: bool = False
    autocast: bool = False

    def precision(self) -> AbstractContextManager[Any]:
        """The context of a forward pass."""
        return torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if self.autocast else nullcontext()


def gradient(model: PreTrainedModel, batch: BatchShape, running: Running, squared: bool = False) -> Work:
    """The gradient of a mean loss, or its square, added to the sums."""
    sums = ColumnSums(model, squared)
    return partial(_score, model, batch, running, [sums], None)


def losses(model: PreTrainedModel, batch: BatchShape, running: Running) -> Work:
    """The losses of the examples, without gradients."""
    return partial(_score, model, batch, running, [], None, frozen=True)


def scores(
    model: PreTrainedModel, batch: BatchShape, running: Running, directions: int, columns: bool, by_token: bool
) -> Work:
    """The rows of several directions, with the sums of gradients or without."""
    named = dict(model.named_parameters())
    us = [{n: torch.empty_like(p, dtype=direction_dtype(p)) for n, p in named.items()} for _ in range(directions)]
    rows = RowSums(model, us, by_token)
    beside: list[AbstractContextManager[Any]] = [ColumnSums(model)] if columns else []
    return partial(_score, model, batch, running, beside, rows, frozen=not columns)


def _score(
    model: PreTrainedModel,
    batch: BatchShape,
    running: Running,
    beside: list[AbstractContextManager[Any]],
    row_sums: RowSums | None,
    frozen: bool = False,
) -> None:
    with _opened(*beside), row_sums or nullcontext() as rows, scoring_mode(model, running.checkpointing):
        still = requires_grad(model.parameters(), False) if frozen else nullcontext()
        with still, running.precision():
            layout = batch.layout()
            if rows is not None:
                rows.begin(layout)
            found = example_losses(model, batch.make(), layout).sum()
            if found.requires_grad:
                found.backward()


@contextmanager
def _opened(*contexts: AbstractContextManager[Any]) -> Iterator[None]:
    if not contexts:
        yield
        return
    with contexts[0], _opened(*contexts[1:]):
        yield


def distilled(
    model: PreTrainedModel, batch: BatchShape, running: Running, base: ModelShape | None, logits_on_host: bool
) -> Work:
    """The prior's gradient, with another model of this shape as the teacher; without one the model is its own."""
    sums = ColumnSums(model)
    teacher = base.model(torch.device("cpu"), len(transformer_blocks(model))).requires_grad_(False) if base else model

    def work() -> None:
        layout = batch.layout()
        with sums, scoring_mode(model, running.checkpointing), running.precision():
            _divergence(model, batch, layout, teacher, logits_on_host).backward()

    return work


def _divergence(
    model: PreTrainedModel, batch: BatchShape, layout: Layout, teacher: PreTrainedModel, logits_on_host: bool
) -> Tensor:
    old = (_HostLogits if logits_on_host else BaseLogits)(teacher, batch.make())
    return _PRIOR.divergences(model, batch.make(), layout, old).sum()


class _HostLogits(BaseLogits):
    """Logits that are kept on another device than the traced one: here they take no room."""

    def _keep(self, logits: Tensor, where: slice, _: object) -> Tensor:
        self._kept = logits.new_empty(1, logits.shape[1])
        return logits[:, 0].clone()

    def at(self, where: slice, device: torch.device) -> Tensor:
        return self._kept.expand(self._count, -1)[where].clone()


def hessian_vector(model: PreTrainedModel, batch: BatchShape, running: Running) -> Work:
    """An exact product of the Hessian with a direction."""
    direction = {name: torch.empty_like(p) for name, p in model.named_parameters()}
    sums = ColumnSums(model)

    def work() -> None:
        layout = batch.layout()
        with sums, scoring_mode(model, running.checkpointing), twice_differentiable(model), running.precision():
            derivative = HessianVectorProduct(model, direction)
            derivative(example_losses(model, batch.make(), layout).sum())

    return work


def train(
    model: PreTrainedModel,
    batch: BatchShape,
    running: Running,
    share: float,
    structured: bool,
    accumulated: bool,
    prior: bool = False,
    logits_on_host: bool = False,
    on_host: bool = False,
) -> Work:
    """The gradient of a training step in compact form, of all weights or of a share of each tensor.

    Args:
        model: Trained.
        batch: One batch of the step.
        running: How the model runs.
        share: Of the weights of each tensor that are trained.
        structured: Whether these are rows, of which alone linear layers compute the gradient.
        accumulated: Whether earlier batches of the step have left a gradient.
        prior: Whether a batch of anchors comes after it, to keep the model near the base model.
        logits_on_host: Whether the base model's logits of the anchors are kept on the host.
        on_host: Whether the gradients of all weights go to masters on the host.
    """
    model.train()
    if running.checkpointing:
        checkpoint_activations(model)
    masters: list[nn.Parameter] = []
    if on_host:
        for weight in model.parameters():
            weight.register_post_accumulate_grad_hook(_drop_gradient)
    elif share == 1:
        compact = CompactParameters(model)
        compact.attach()
        masters = list(compact.masters)
    else:
        masters = _attach(model, share, structured)

    def work() -> None:
        with running.precision():
            example_losses(model, batch.make(), batch.layout()).sum().backward()
            if prior:
                _divergence(model, batch, batch.layout(), model, logits_on_host).backward()
        if not accumulated:
            for master in masters:
                master.grad = None

    return work


def _attach(model: PreTrainedModel, share: float, structured: bool) -> list[nn.Parameter]:
    """Compact masters of a share of each tensor, as `CompactParameters` makes them from a mask, which has values."""
    masters: dict[nn.Parameter, nn.Parameter] = {}
    for weight in model.parameters():
        rows = max(1, round(share * weight.shape[0]))
        count = rows * (weight.numel() // weight.shape[0]) if structured else max(1, round(share * weight.numel()))
        master = masters[weight] = nn.Parameter(torch.empty(count, dtype=accumulator_dtype(weight)))
        index = torch.zeros(count, dtype=torch.int32)
        weight.register_post_accumulate_grad_hook(partial(_add_gradient, master, index))
    if structured:
        for module in filter(is_linear, model.modules()):
            layer: Any = module
            height, width = layer.weight.shape
            index = torch.zeros(max(1, round(share * height)), dtype=torch.int64)
            columns = Columns(torch.zeros(width, dtype=torch.int64), (slice(0, width),))
            part = Rectangle(Columns(index), columns, slice(0, len(index) * width))
            hook = ChosenGradientHook(module, masters[layer.weight], [part])
            module.register_forward_hook(hook, with_kwargs=True)
    return list(masters.values())


def _drop_gradient(weight: Tensor) -> None:
    weight.grad = None


def _add_gradient(master: nn.Parameter, index: Tensor, weight: Tensor) -> None:
    assert weight.grad is not None
    gradient = weight.grad.flatten().index_select(0, index).to(master.dtype)
    master.grad = gradient if master.grad is None else master.grad.add_(gradient)
    weight.grad = None
