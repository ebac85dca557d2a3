"""The paths, against a plain loop of torch's optimizer over the same examples, one gradient at a time."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from baseline_cases import OK, Job, differentiate, flat
from dualsft_baselines import LessCheckpoints, TrainOnValidation
from torch import Tensor
from torch.nn import functional as F
from torch.optim import AdamW
from transformers import LlamaForCausalLM

from dualsft import PieceRows, UserError, load_selection
from dualsft.selection import Selection

RATE = 0.02
EXACT = ["--model.dtype", "float64", "--trainer.precision", "64-true", "--data.batch_size", "8"]
TRAINING = ["--model.path.learning_rate", str(RATE), "--model.path.epochs"]


def epochs(job: Job, trained_on: str, count: int) -> Iterator[tuple[LlamaForCausalLM, Tensor]]:
    """The model before training on all examples of a file at once, and after each step; with Adam's ĉ there."""
    model = LlamaForCausalLM.from_pretrained(job.model, dtype=torch.float64).eval()
    optimizer = AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    yield model, torch.zeros(())
    for step in range(1, count + 1):
        mean = differentiate(model, trained_on)[1].mean(0)
        for parameter, part in zip(
            model.parameters(), mean.split([p.numel() for p in model.parameters()]), strict=True
        ):
            parameter.grad = part.view_as(parameter)
        optimizer.step()
        moments = flat(optimizer.state[parameter]["exp_avg_sq"] for parameter in model.parameters())
        yield model, moments / (1 - 0.999**step)


def scores(selection: Selection) -> Tensor:
    """Of the examples that can be trained on."""
    found = selection.examples["score"].to_pylist()
    assert [i for i, score in enumerate(found) if score is not None] == OK
    return torch.tensor([found[i] for i in OK], dtype=torch.float64)


@pytest.mark.parametrize("by", ["change", "fall"])
def test_train_on_validation(job: Job, tmp_path: Path, by: str) -> None:
    """Losses before and after training on both validation examples; some rise, so that the choices differ."""
    along = ["--model.path.along", "dualsft_baselines.TrainOnValidation", "--model.path.along.by", by]
    options = [*along, *EXACT, *TRAINING, "12", "--model.path.held_out", "0", "--model.order", "data"]
    found = load_selection(job.select(tmp_path / "out", *options))
    losses = [differentiate(model, job.train)[0] for model, _ in epochs(job, job.validation, 12)]
    falls = losses[0] - losses[-1]
    assert bool((falls < 0).any())
    torch.testing.assert_close(scores(found), falls.abs() if by == "change" else falls, rtol=1e-8, atol=0.0)
    assert found.manifest["path_walked"]["validation"]["steps"] == [0, 12]
    assert "gradient" not in " ".join(phase["name"] for phase in found.manifest["phases"])


def test_less_checkpoints(job: Job, tmp_path: Path) -> None:
    """η times the cosines of Adam's steps with the validation gradient after each epoch, and no other sum."""
    options = ["--model.path.along", "dualsft_baselines.LessCheckpoints", "--model.preconditioner", "adam"]
    folder = job.select(tmp_path / "out", *options, *EXACT, *TRAINING, "3", "--model.warmup.fraction", "1.0")
    expected, without_norm, weights = torch.zeros(len(OK)), torch.zeros(len(OK)), torch.zeros(())
    points = epochs(job, job.train, 3)
    next(points)
    for model, moments in points:
        v = differentiate(model, job.validation)[1].mean(0)
        gradients = differentiate(model, job.train)[1]
        preconditioner = 1 / (moments.sqrt() + 1e-8)
        expected = expected + RATE * F.cosine_similarity(preconditioner * gradients, v[None], dim=1, eps=1e-30)
        without_norm = without_norm + RATE * (preconditioner * gradients) @ v
        weights = weights + RATE * preconditioner * v * gradients.sum(0)
    found = load_selection(folder)
    torch.testing.assert_close(scores(found), expected, rtol=1e-4, atol=0.0)  # Llama's norms are in float32
    assert expected.argsort().tolist() != without_norm.argsort().tolist(), "it shows nothing"
    of_weights = found.parameter_scores()
    names = [name for name, _ in LlamaForCausalLM.from_pretrained(job.model).named_parameters()]
    scored = flat(of_weights[name] for name in names)
    torch.testing.assert_close(scored, weights, rtol=1e-3, atol=1e-6 * float(weights.abs().max()))
    assert found.manifest["path_walked"]["validation"]["steps"] == [0, 1, 2, 3]


def test_an_example_without_a_gradient_has_cosine_zero() -> None:
    """Its score and its norm are both zero."""
    norms = torch.tensor([0.0, 2.0], dtype=torch.float64)
    rows = PieceRows(torch.tensor([1, 2]), torch.tensor([0.0, 6.0], dtype=torch.float64), torch.tensor([3, 3]), 1.5)
    rows = PieceRows(rows.example_id, rows.score, rows.num_tokens, 1.5, preconditioned_gradient_norm=norms)
    assert LessCheckpoints().contribution(rows).tolist() == [0.0, 2.0]


def test_train_on_validation_refuses_what_it_does_not_know() -> None:
    """The message has the value and what it may be."""
    with pytest.raises(UserError, match="scores by the 'change' or the 'fall', not 'rise'"):
        TrainOnValidation("rise")  # type: ignore[arg-type]
