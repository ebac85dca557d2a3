import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dualsft.gradients import gradient_pass
from dualsft.scorers import FirstOrder, ParameterStatistics, Scorer
from dualsft.selection.directions import directions
from dualsft.selection.scoring_mode import scoring_mode
from dualsft.selection.warmup import EPS
from tests.selection.tiny import (
    assert_same_gradients,
    collate,
    given,
    gradient_loop,
    inner,
    make,
    make_examples,
    random_direction,
    total,
)


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_checkpointing_does_not_bring_dropout_back(architecture: str) -> None:
    """A model that drops out by its layers' training flags scores without dropout, recomputing activations or not."""
    model, examples = make(architecture), make_examples()
    assert max(getattr(model.config, name, 0.0) for name in ("attn_pdrop", "dropout")) > 0
    u, gradients = random_direction(model), gradient_loop(model, examples)
    with scoring_mode(model, checkpointing=True):
        found = gradient_pass(model, given([collate(examples)]), directions=[u])
    assert list(found.rows[0].values()) == pytest.approx([inner(u, g) for g in gradients], rel=1e-9)
    assert_same_gradients(found.sums, total(gradients), 1e-11)


@pytest.mark.parametrize(("checkpointing", "calls_per_batch"), [(False, 1), (True, 2)])
def test_checkpointing_recomputes(checkpointing: bool, calls_per_batch: int) -> None:
    """Inside, each block runs a second time for the backward pass if, and only if, that was asked for."""
    model, calls = make("gpt2"), []
    model.transformer.h[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    with scoring_mode(model, checkpointing):
        gradient_pass(model, given([collate(make_examples())]))
    assert len(calls) == calls_per_batch


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_mode_ends_in_evaluation(checkpointing: bool) -> None:
    """Whatever happens inside, no module is left in training."""
    model = make("gpt2").train()

    def fail() -> None:
        with scoring_mode(model, checkpointing):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not any(module.training for module in model.modules())


def two_weights() -> nn.Module:
    """A toy with a frozen weight."""
    model = nn.Module()
    model.a, model.b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    model.frozen = nn.Parameter(torch.zeros(4), requires_grad=False)
    return model


def test_directions_precondition_by_the_second_moment() -> None:
    """U = (η/n) v / (sqrt(ĉ)+eps); without moments (η/n) v; frozen weights have none."""
    gradient = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([0.0, 3.0, 4.0])}
    moments = {"a": torch.tensor([4.0, 0.0]), "b": torch.ones(3)}
    u = directions(two_weights(), FirstOrder(), dict(gradient), {n: c.clone() for n, c in moments.items()}, 0.5, 10)
    assert set(u) == {"a", "b"}
    for name, found in u.items():
        torch.testing.assert_close(found, 0.05 * gradient[name] / (moments[name].sqrt() + EPS))
    plain = directions(two_weights(), FirstOrder(), dict(gradient), {}, 0.5, 10)
    assert all(torch.equal(plain[name], 0.05 * v) for name, v in gradient.items())


class Recorder(Scorer):
    """Notes which inputs of earlier parameters are still alive."""

    def __init__(self) -> None:
        self.earlier: list[weakref.ref[Tensor]] = []
        self.alive: list[int] = []
        self.seen: list[Any] = []

    def direction(self, statistics: ParameterStatistics) -> Tensor:
        """V, copied."""
        gc.collect()
        self.alive.append(sum(reference() is not None for reference in self.earlier))
        self.earlier += [weakref.ref(statistics.validation_gradient), weakref.ref(statistics.preconditioner)]
        self.seen.append((statistics.name, statistics.weight.shape, statistics.step_size, statistics.num_examples))
        return statistics.validation_gradient.clone()


def test_one_parameter_at_a_time() -> None:
    """A scorer sees every parameter's facts, and v and ĉ of a parameter are gone once it has been seen."""
    scorer = Recorder()
    gradient = {"a": torch.zeros(2), "b": torch.zeros(3)}
    moments = {"a": torch.zeros(2), "b": torch.zeros(3)}
    directions(two_weights(), scorer, gradient, moments, 0.5, 10)
    assert scorer.seen == [("a", (2,), 0.5, 10), ("b", (3,), 0.5, 10)]
    assert scorer.alive == [0, 0]
    assert gradient == moments == {}
