import math

import pytest
import torch
from torch import Tensor

from dualsft.evaluation import ExactMatch, LanguageModelMetrics
from tests.world.data import random_batch
from tests.world.models import VOCABULARY


def logits_and_labels(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random logits over a ragged batch; some of the highest are the right ones."""
    batch = random_batch(7, 12, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(7, 12, VOCABULARY, generator=generator)
    right = torch.rand(7, 11, generator=generator) < 0.4
    logits[:, :-1].scatter_add_(2, batch["input_ids"][:, 1:, None], 9.0 * right[:, :, None])
    return logits, batch["labels"]


def directly(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Token by token, in float64, with nothing but the definition."""
    losses: list[float] = []
    hits, of_examples = [], []
    for row in range(len(labels)):
        before = len(losses)
        for place in range(1, labels.shape[1]):
            label = int(labels[row, place])
            if label != -100:
                scores = logits[row, place - 1].double()
                losses.append(float(scores.exp().sum().log() - scores[label]))
                hits.append(int(scores.argmax()) == label)
        of_examples += [sum(losses[before:]) / (len(losses) - before)] if len(losses) > before else []
    loss, accuracy = sum(losses) / len(losses), sum(hits) / len(hits)
    example_loss = sum(of_examples) / len(of_examples)
    return {"loss": loss, "perplexity": math.exp(loss), "token_accuracy": accuracy, "example_loss": example_loss}


@pytest.mark.parametrize("sizes", [[7], [1, 6], [3, 3, 1], [1] * 7])
def test_metrics_do_not_depend_on_the_batches(sizes: list[int]) -> None:
    """However the examples are cut into batches, every supervised token weighs the same, or every example."""
    logits, labels = logits_and_labels()
    metrics = LanguageModelMetrics(by_example=True)
    for part, wanted in zip(logits.split(sizes), labels.split(sizes), strict=True):
        metrics.update(part, wanted)
    found = {name: value.item() for name, value in metrics.compute().items()}
    assert found == pytest.approx(directly(logits, labels), rel=1e-5)
    assert 0.2 < found["token_accuracy"] < 0.8


def test_metrics_start_anew_after_reset() -> None:
    """`reset` forgets every batch."""
    metrics = LanguageModelMetrics()
    metrics.update(*logits_and_labels(1))
    metrics.reset()
    logits, labels = logits_and_labels(2)
    metrics.update(logits, labels)
    assert metrics.compute()["loss"].item() == pytest.approx(directly(logits, labels)["loss"], rel=1e-5)


def test_a_broken_model_shows() -> None:
    """One NaN makes the loss NaN: it is not left out of the mean."""
    logits, labels = logits_and_labels()
    logits[0, -2] = torch.nan
    metrics = LanguageModelMetrics()
    metrics.update(logits, labels)
    assert metrics.compute()["loss"].isnan()


def test_unsupervised_examples_weigh_nothing() -> None:
    """A batch without labels changes no metric."""
    logits, labels = logits_and_labels()
    metrics = LanguageModelMetrics()
    metrics.update(logits, labels)
    before = {name: value.item() for name, value in metrics.compute().items()}
    metrics.update(logits, torch.full_like(labels, -100))
    assert {name: value.item() for name, value in metrics.compute().items()} == before


def test_exact_match_counts_over_batches() -> None:
    """The share of equal answers; one that was not found never matches, not even a reference that lacks it too."""
    metric = ExactMatch()
    metric.update(["4", "5"], ["4", "6"])
    metric.update([None, "", None], [None, "", "7"])
    assert metric.compute().item() == pytest.approx(2 / 5)
    metric.reset()
    metric.update(["1"], ["1"])
    assert metric.compute().item() == 1
