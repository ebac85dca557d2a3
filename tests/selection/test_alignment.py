from pathlib import Path

import pytest
import torch

from dualsft.models.loading import load_model
from dualsft.plans.live import LiveBytes
from dualsft.selection import Warmup
from dualsft.selection.alignment import cosine
from dualsft.selection.prior import Prior
from tests.references import gradient_loop, slow_prior, total
from tests.world.data import OK
from tests.world.jobs import ADAM, SGD, Inputs, select
from tests.world.models import save_tiny_model


def test_cosine_is_that_of_the_joined_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64 over all parameters, tiny ones too and chunk by chunk; there is none with a zero vector."""
    monkeypatch.setattr("dualsft.selection.alignment._CHUNK", 4)
    generator = torch.Generator().manual_seed(0)
    one = {name: 1e-25 * torch.randn(3, 5, generator=generator) for name in "ab"}
    other = {name: value + 1e-25 * torch.randn(3, 5, generator=generator) for name, value in one.items()}
    a, b = (torch.cat([v[n].flatten().double() for n in "ab"]) for v in (one, other))
    assert cosine(one, other) == pytest.approx(float(a @ b / a.norm() / b.norm()), rel=1e-12)
    assert cosine(one, {name: -3 * value for name, value in one.items()}) == pytest.approx(-1)
    assert cosine(one, {name: torch.zeros_like(value) for name, value in one.items()}) is None


def test_a_cosine_takes_little_beside_its_vectors() -> None:
    """In float64 a large embedding would take as much as a pass over data."""
    size = 2**22
    with LiveBytes(vocabulary=0) as live:
        assert cosine({"a": torch.ones(size)}, {"a": torch.ones(size)}) == pytest.approx(1)
    assert live.peaks[-1].size < 2 * 4 * size + 3 * 8 * size / 2


def test_a_selection_tells_how_its_directions_lie(inputs: Inputs, tmp_path: Path) -> None:
    """∇(validation loss) to ∇(prior), and u to ḡ, as a loop of autograd over single examples in float64 gives them."""
    checkpoint, prior = save_tiny_model(tmp_path / "checkpoint", seed=7), Prior(weight=5.0, fraction=0.4)
    options = {"preconditioner": "none", "warmup": Warmup(checkpoint=checkpoint), "prior": prior}
    found = select(inputs, tmp_path / "out", options).diagnostics.basis
    model, base = (load_model(name, "float64").eval() for name in (checkpoint, inputs.model))
    pool, target = inputs.examples("train"), inputs.examples("validation").values()
    anchors = prior.term().draw(OK, 0)
    slope = torch.stack([slow_prior(model, base, pool[i], prior) for i in anchors]).mean()
    names, parameters = zip(*model.named_parameters(), strict=True)
    of_prior = dict(zip(names, torch.autograd.grad(slope, parameters), strict=True))
    validation = total(gradient_loop(model, target))
    u = {name: v / len(target) + prior.weight * of_prior[name] for name, v in validation.items()}
    due = cosine(validation, of_prior), cosine(u, total(gradient_loop(model, pool.values())))
    aligned = found.alignment["validation"]
    assert (aligned.validation_prior, aligned.direction_pool) == pytest.approx(due, abs=1e-4)
    assert list(found.alignment) == ["validation"]
    assert found.warmup_steps is None


def test_the_steps_of_a_warm_up_are_counted(inputs: Inputs, tmp_path: Path) -> None:
    """Four of eight examples in batches of up to two, twice; without a prior there is no cosine with it."""
    basis = select(inputs, tmp_path / "out", {**ADAM, "data_budget": 3}).diagnostics.basis
    assert basis.warmup_steps == 4
    assert basis.alignment["validation"].validation_prior is None
    assert select(inputs, tmp_path / "none", {**SGD, "data_budget": 3}).diagnostics.basis.warmup_steps is None
