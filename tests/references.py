"""Slow obvious references: loops of autograd over examples, the prior, and dense matrices, in float64."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from dualsft.models.loading import load_model
from dualsft.objectives import example_losses
from dualsft.objectives.tail import _With
from dualsft.selection.dense_training import EPS
from dualsft.selection.prior import Prior
from tests.cases import Example, Gradients, collate
from tests.world.jobs import Inputs


class _NoFloat32(TorchFunctionMode):
    """Whatever asks for float32 gets float64."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.float:
            return args[0].double()
        args = [torch.float64 if x is torch.float32 else x for x in args]
        kwargs = {name: torch.float64 if x is torch.float32 else x for name, x in (kwargs or {}).items()}
        return function(*args, **kwargs)


@contextmanager
def float64_throughout() -> Iterator[None]:
    """Models stay in float64 where they would compute in float32 whatever their weights are, as norms do."""
    call, inside = nn.Module.__call__, False

    def wide_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        if inside:
            return call(module, *args, **kwargs)
        inside = True
        try:
            with _NoFloat32():
                return call(module, *args, **kwargs)
        finally:
            inside = False

    def wide_forward(part: Any, *args: Any, **kwargs: Any) -> Any:
        with _NoFloat32():
            return forward(part, *args, **kwargs)

    forward = _With.forward  # of a tail that is computed again in backward, where no module is called around it
    with (
        mock.patch.object(nn.Module, "__call__", wide_call),
        mock.patch.object(_With, "forward", wide_forward),
        mock.patch.object(_With, "__call__", wide_forward),
    ):
        yield


# Gradients, one example at a time


def gradient_loop(model: PreTrainedModel, examples: Iterable[Example]) -> list[Gradients]:
    """g_i of each example: autograd over one unpadded example at a time."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = []
    for example in examples:
        loss = example_losses(model, collate([example])).sum()
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        gradients.append(
            {
                name: torch.zeros_like(p) if g is None else g
                for (name, p), g in zip(parameters.items(), found, strict=True)
            }
        )
    return gradients


def total(gradients: Sequence[Gradients]) -> Gradients:
    """Σ_i g_i."""
    return {name: torch.stack([g[name].double() for g in gradients]).sum(0) for name in gradients[0]}


def inner(u: Gradients, g: Gradients) -> float:
    """<u, g> in float64."""
    return sum(float((u[name].double() * g[name].double()).sum()) for name in g)


def inner_size(u: Gradients, g: Gradients) -> float:
    """Σ_j |u_j g_j|, the size of the numbers that an inner product adds."""
    return sum(float((u[name].double() * g[name].double()).abs().sum()) for name in g)


def assert_rows(found: Sequence[float], u: Gradients, gradients: Sequence[Gradients], relative: float) -> None:
    """Equal to <u, g_i> up to a fraction of the size of the numbers that were added."""
    assert len(found) == len(gradients)
    for value, g in zip(found, gradients, strict=True):
        assert abs(value - inner(u, g)) <= relative * inner_size(u, g)


def assert_same_gradients(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], relative: float) -> None:
    """Equal up to a fraction of each tensor's largest entry (some are zero but for rounding, as biases of keys)."""
    assert found.keys() == expected.keys()
    largest = max(float(reference.abs().max()) for reference in expected.values())
    for name, reference in expected.items():
        scale = max(float(reference.abs().max()), 1e-3 * largest)
        torch.testing.assert_close(found[name].double(), reference.double(), rtol=0.0, atol=relative * scale, msg=name)


def slow_scores(
    inputs: Inputs, checkpoint: str, step_size: float, preconditioner: Callable[[str], Any] = lambda _: 1.0
) -> tuple[dict[int, float], Gradients]:
    """Both score vectors by a loop of autograd over examples, in float64: φ_i and φ_j."""
    model: PreTrainedModel = load_model(checkpoint, "float64").eval()
    pool = inputs.examples("train")
    target = inputs.examples("validation")
    summed = total(gradient_loop(model, target.values()))
    u = {name: step_size / len(pool) * preconditioner(name) * g / len(target) for name, g in summed.items()}
    gradients = gradient_loop(model, pool.values())
    rows = {i: inner(u, g) for i, g in zip(pool, gradients, strict=True)}
    return rows, {name: u[name] * g for name, g in total(gradients).items()}


# The prior, one token at a time


def slow_prior(model: PreTrainedModel, teacher: PreTrainedModel, example: Example, prior: Prior) -> Tensor:
    """τ² w KL of one unpadded example, in the models' own type, differentiable as often as the model is."""
    ids, labels = example
    new = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    with torch.no_grad():
        old = teacher(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    divergences, largest, entropies = [], [], []
    for t, label in enumerate(labels[1:]):
        if label == -100:
            continue
        p_old = torch.log_softmax(old[t] / prior.temperature, 0)
        p_new = torch.log_softmax(new[t] / prior.temperature, 0)
        divergences.append((p_old.exp() * (p_old - p_new)).sum())
        sure = torch.log_softmax(old[t], 0)
        largest.append(sure.exp().max())
        entropies.append(-(sure.exp() * sure).sum())
    if not divergences:
        return new.sum() * 0
    confidence = {
        "uniform": torch.ones(()),
        "max_prob": torch.stack(largest).mean(),
        "entropy_inv": 1 / (1 + torch.stack(entropies).mean()),
    }
    return prior.temperature**2 * confidence[prior.confidence] * torch.stack(divergences).mean()


# Every matrix written out


@dataclass(frozen=True)
class Dense:
    """Everything at one scoring checkpoint, flat.

    Attributes:
        names: The parameters, in the order in which they are laid out.
        shapes: Their shapes.
        ids: The pool's examples.
        pool: G, (example, weight).
        validation: The gradients of the validation examples, (example, weight).
        hessian: H of the mean validation loss, (weight, weight).
        moments: ĉ, (weight).
    """

    names: list[str]
    shapes: list[torch.Size]
    ids: list[int]
    pool: Tensor
    validation: Tensor
    hessian: Tensor
    moments: Tensor

    @classmethod
    def at(cls, checkpoint: str, inputs: Inputs) -> "Dense":
        """Differentiate at this checkpoint, which has a second moment beside it."""
        model = load_model(checkpoint, "float64").eval()
        parameters = dict(model.named_parameters())
        moments = load_file(Path(checkpoint) / "second_moment.safetensors")
        pool, validation = inputs.examples("train"), inputs.examples("validation")
        with sdpa_kernel(SDPBackend.MATH):
            return cls(
                list(parameters),
                [p.shape for p in parameters.values()],
                list(pool),
                torch.stack([flat_gradient(model, [example]) for example in pool.values()]),
                torch.stack([flat_gradient(model, [example]) for example in validation.values()]),
                hessian(model, list(validation.values())),
                torch.cat([moments[name].double().flatten() for name in parameters]),
            )

    def preconditioner(self, name: str) -> Tensor:
        """P, (weight)."""
        return 1 / (self.moments.sqrt() + EPS) if name == "adam" else torch.ones_like(self.moments)

    def step(self, preconditioner: str) -> Tensor:
        """D = P ⊙ ḡ, (weight)."""
        return self.preconditioner(preconditioner) * self.pool.mean(0)

    def curvature(self, kind: str) -> Tensor:
        """The Hessian as a scorer sees it, (weight, weight)."""
        if kind == "second_moment":
            return self.moments.diag()
        if kind == "empirical_fisher":
            return self.validation.square().mean(0).diag()
        return self.hessian if kind == "hessian" else torch.zeros_like(self.hessian)

    def direction(self, kind: str, preconditioner: str, step_size: float) -> Tensor:
        """U = (η/n) P ⊙ (v − ½ η H d), (weight)."""
        slope = self.validation.mean(0) - step_size / 2 * self.curvature(kind) @ self.step(preconditioner)
        return step_size / len(self.ids) * self.preconditioner(preconditioner) * slope

    def flat(self, tensors: dict[str, Tensor]) -> Tensor:
        """By name to flat."""
        return torch.cat([tensors[name].double().flatten() for name in self.names])


def flat_gradient(model: PreTrainedModel, examples: Sequence[Example]) -> Tensor:
    """∇ of the mean loss, (weight)."""
    loss = torch.stack([example_losses(model, collate([example])).sum() for example in examples]).mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def hessian(model: PreTrainedModel, examples: Sequence[Example]) -> Tensor:
    """∇² of the mean loss: the derivatives of ∇ along unit vectors, 128 rows at a time."""
    parameters = list(model.parameters())
    loss = torch.stack([example_losses(model, collate([example])).sum() for example in examples]).mean()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)])
    rows = []
    for units in torch.eye(len(gradient), dtype=gradient.dtype).split(128):
        parts = torch.autograd.grad(gradient, parameters, units, retain_graph=True, is_grads_batched=True)
        rows.append(torch.cat([part.flatten(1) for part in parts], dim=1))
    return torch.cat(rows)
