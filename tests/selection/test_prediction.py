"""What the quadratic predicts against what a step brings."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from dualsft import InstructionDataModule
from dualsft.data.layout import Batch, Layout
from dualsft.matrix.curvature import HessianVectorProduct
from dualsft.matrix.passes import gradient_pass
from dualsft.models.loading import load_model
from dualsft.objectives import example_losses
from dualsft.quickstart import ASSETS, GSM8K
from dualsft.scorers import FirstOrder, HessianVector, Scorer
from dualsft.selection.directions import Statistics, column_totals, preconditioner, scorer_direction
from dualsft.selection.step import along_pool_step, settle
from tests.cases import given
from tests.world.data import write_jsonl
from tests.world.jobs import SGD, Inputs, select

DIMENSIONS = 5


class Regression(PreTrainedModel):
    """Linear regression: V is a quadratic of its weights, with H = Xᵀ X / n."""

    config_class = PretrainedConfig

    def __init__(self) -> None:
        super().__init__(PretrainedConfig())
        self.w = nn.Parameter(torch.randn(DIMENSIONS, dtype=torch.float64))


def points(seed: int) -> tuple[Tensor, Tensor]:
    """Seven points and their values; the first data and the second share a trend."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(7, DIMENSIONS, generator=generator, dtype=torch.float64)
    return x, x @ torch.ones(DIMENSIONS, dtype=torch.float64) + torch.randn(7, generator=generator, dtype=torch.float64)


def losses_of(x: Tensor, y: Tensor) -> Any:
    """½ (x_i · w − y_i)² of each example."""

    def losses(model: Any, batch: Batch, layout: Layout) -> Tensor:
        ids = batch["example_id"]
        return (x[ids] @ model.w - y[ids]).square() / 2

    return losses


def batch_of(ids: list[int]) -> Batch:
    """Examples by their ids alone."""
    ones = torch.ones(len(ids), 1, dtype=torch.int64)
    return {"example_id": torch.tensor(ids), "input_ids": ones, "attention_mask": ones, "labels": ones}


@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize("step_size", [0.01, 0.3, "auto"])
def test_second_order_is_exact_on_a_quadratic(step_size: Any, adam: bool) -> None:
    """V(θ) − V(θ − η d) is Σ_j φ_j at second order to rounding, and off by ½ η² dᵀHd, no less, at first order."""
    torch.manual_seed(0)
    model, (x, y), (pool_x, pool_y) = Regression(), points(1), points(2)
    batches = given([batch_of([0, 1, 2]), batch_of([3, 4, 5, 6])])
    moments = {"w": torch.rand(DIMENSIONS, dtype=torch.float64) + 0.1} if adam else None
    p = preconditioner(model, moments)
    v = gradient_pass(model, batches, losses=losses_of(x, y)).sums["w"] / 7
    sums = gradient_pass(model, batches, losses=losses_of(pool_x, pool_y)).sums
    d = {"w": p["w"] * sums["w"] / 7}
    derivative = HessianVectorProduct(model, d)
    bend = gradient_pass(model, batches, losses=losses_of(x, y), derivative=derivative).sums["w"] / 7
    torch.testing.assert_close(bend, x.T @ x @ d["w"] / 7)
    known = Statistics(model, {"w": v}, p, 7, {"w": sums["w"] / 7}, hessian_vector={"w": bend})
    eta = settle(step_size, [along_pool_step(HessianVector(), known)])

    def value(w: Tensor) -> Tensor:
        return (x @ w - y).square().mean() / 2

    def predicted(scorer: Scorer) -> float:
        return column_totals(scorer_direction(scorer, known, eta), sums).total

    measured = float((value(model.w) - value(model.w - eta * d["w"])).detach())
    missing = float(eta**2 / 2 * d["w"] @ x.T @ x @ d["w"] / 7)
    assert missing > 1e-6
    assert predicted(HessianVector()) == pytest.approx(measured, rel=1e-12, abs=1e-14)
    assert predicted(FirstOrder()) == pytest.approx(measured + missing, rel=1e-12)
    if step_size == "auto":
        around = [float(value(model.w - size * d["w"]).detach()) for size in (0.9 * eta, eta, 1.1 * eta)]
        assert min(around) == around[1]


def rows(path: Path, kind: str | None, count: int) -> list[dict[str, Any]]:
    """The first rows of an embedded file, of one source if asked."""
    records = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [record for record in records if kind is None or record["source"] == kind][:count]


@pytest.mark.heavy
def test_second_order_is_nearer_on_a_language_model(tmp_path: Path) -> None:
    """On the embedded Llama and real text the measured fall of the loss is nearer to the prediction with the term."""
    train = write_jsonl(tmp_path / "train.jsonl", rows(GSM8K / "pool.jsonl", "target", 16))
    validation = write_jsonl(tmp_path / "validation.jsonl", rows(GSM8K / "validation.jsonl", None, 8))
    inputs = Inputs(str(ASSETS / "model"), train, validation)
    options = {**SGD, "scorer": HessianVector(), "step_size": "auto", "dtype": "float32"}
    data = {"max_length": 128, "batch_tokens": 1024}
    told = select(inputs, tmp_path / "out", options, data).manifest["prediction"]
    module = inputs.data(**data)
    model = load_model(inputs.model, "float32").eval()
    before = validation_loss(module, model)
    step = gradient_pass(model, lambda first: module.pool_loader(start=first))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    for share in (0.1, 0.25, 0.5, 1.0):
        eta = share * told["step_size"]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name] - eta / step.counted * step.sums[name])
        measured = before - validation_loss(module, model)
        first = eta * told["slope"]
        second = first - eta**2 / 2 * told["curvature"]
        assert measured > 0
        assert abs(second - measured) < 0.5 * abs(first - measured), share


@torch.no_grad()
def validation_loss(data: InstructionDataModule, model: PreTrainedModel) -> float:
    """Mean over the validation examples."""
    losses = [example_losses(model, batch) for batch in data.validation_loader()]
    return float(torch.cat(losses).double().mean())
