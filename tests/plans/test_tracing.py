"""What a batch takes: tensors without values against real ones, and short models against a deep one."""

from functools import partial
from pathlib import Path

import pytest
import torch

from dualsft.plans import passes, tracing
from dualsft.plans.batch import BatchShape
from dualsft.plans.live import LiveBytes
from dualsft.plans.passes import Running
from dualsft.plans.shape import ModelShape
from dualsft.plans.tracing import trace
from tests.cases import make
from tests.plans.cases import tiny_shape
from tests.world.models import VOCABULARY, tiny_llama

BATCH = BatchShape(3, 20)
WORK = {
    "gradient": partial(passes.gradient, batch=BATCH, running=Running()),
    "scores": partial(passes.scores, batch=BATCH, running=Running(), directions=2, columns=True, by_token=False),
    "training": partial(
        passes.train, batch=BATCH, running=Running(True), share=0.25, structured=True, accumulated=False
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WORK)
def test_shapes_take_what_tensors_take(tmp_path: Path, name: str) -> None:
    """The peak of a batch on tensors without values is that on real ones, or somewhat more in so small a model."""
    with LiveBytes(VOCABULARY) as live:
        model = tiny_llama()
        work = WORK[name](model)
        work()
        before = live.now
        live.restart()
        work()
        real = live.peaks[0].size - before
    assert real <= trace(tiny_shape(tmp_path), BATCH, WORK[name]).size <= 1.06 * real


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixtures_of_experts_are_traced_too(tmp_path: Path, dtype: torch.dtype) -> None:
    """Their experts' products have shapes in every type; which tokens an expert has takes no part in the sizes."""
    model = make("mixtral", dtype)
    model.config.save_pretrained(tmp_path)
    with LiveBytes(model.config.vocab_size) as live:
        work = WORK["scores"](make("mixtral", dtype))
        work()
        before = live.now
        live.restart()
        work()
        real, flops = live.peaks[0].size - before, live.flops
    traced = trace(ModelShape(tmp_path, str(dtype).removeprefix("torch.")), BATCH, WORK["scores"])  # type: ignore[arg-type]
    assert real <= traced.size <= 1.06 * real
    assert traced.flops == flops


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scores", "training"])
def test_a_line_through_short_models_reaches_deep_ones(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of five blocks takes what two and three blocks tell, of bytes and of operations."""
    shape = tiny_shape(tmp_path, num_hidden_layers=5)
    drawn = trace(shape, BATCH, WORK[name])
    shape.traced.clear()
    monkeypatch.setattr(tracing, "_SHORT", (5,))
    real = trace(shape, BATCH, WORK[name])
    assert drawn.size == pytest.approx(real.size, rel=0.01)
    assert drawn.flops == real.flops


def test_logits_are_told_apart() -> None:
    """Storages count once, views not at all, and those as wide as the vocabulary are logits."""
    with LiveBytes(10) as live:
        logits = torch.zeros(5, 10)
        flat = logits.view(-1)
        other = torch.zeros(3)
        assert live.now == 4 * 53
        del logits, flat
        assert live.now == 4 * 3
        assert (live.peaks[0].size, live.peaks[0].logits) == (4 * 53, 4 * 50)
        del other
