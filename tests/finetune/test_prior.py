"""The prior term of a fit's loss, against a plain loop with a second model as the base."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, EarlyStopping
from torch import Tensor

from dualsft.data.batches import TrainingBatches
from dualsft.data.layout import Batch, Layout, one_example
from dualsft.errors import UserError
from dualsft.finetune import TrainingPrior
from dualsft.models.loading import load_model
from dualsft.selection import load_selection
from tests.finetune.test_losses import LOSSES, sgd
from tests.world.fits import Losses, weights
from tests.world.jobs import CHOSEN, POOL, SaveOften, Workspace, trainer

PRIOR = TrainingPrior(weight=0.7, temperature=1.5, confidence="max_prob")


def prior(model: Any, base: Any, batch: Batch) -> Tensor:
    """The mean of τ² w KL over the examples of a batch, each computed alone."""
    found = []
    for k in range(len(Layout.of(batch).spans)):
        alone = one_example(batch, k)
        supervised = alone["labels"][0, 1:] != -100
        new, old = (of(alone["input_ids"]).logits[0, :-1][supervised] for of in (model, base))
        confidence = old.softmax(-1).amax(-1).mean()
        p_new, p_old = ((logits / PRIOR.temperature).log_softmax(-1) for logits in (new, old))
        divergence = (p_old.exp() * (p_old - p_new)).sum(-1).mean()
        found.append(PRIOR.temperature**2 * confidence * divergence)
    return torch.stack(found).mean()


def plain_loop(workspace: Workspace, loss: str, accumulated: int, **data: Any) -> tuple[dict[str, Tensor], list[float]]:
    """The weights after two epochs of dense gradient steps, masked, and the prior terms beside the batches."""
    model, base = (load_model(workspace.model, "float64") for _ in range(2))
    mask, made = load_selection(workspace.selection).mask(), workspace.data(**data)
    optimizer, loader = sgd(model.parameters()), made.train_dataloader()
    left = [i for i in range(POOL) if i not in CHOSEN]
    anchors, terms = made.training_loader(left, made.seed + 1), []
    order = forever(anchors)
    assert isinstance(loader.sampler, TrainingBatches)
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        batches = list(loader)
        for first in range(0, len(batches), accumulated):
            step = batches[first : first + accumulated]
            optimizer.zero_grad()
            beside = [prior(model, base, anchored) for anchored in islice(order, len(step))]
            tokens = torch.tensor([float((b["labels"][:, 1:] != -100).sum()) for b in step], dtype=torch.float64)
            shares = tokens / tokens.sum() if loss == "token_mean" else torch.full_like(tokens, 1 / len(step))
            (LOSSES[loss](model, step) + PRIOR.weight * (shares * torch.stack(beside)).sum()).backward()
            terms += [term.item() for term in beside]
            for name, weight in model.named_parameters():
                assert weight.grad is not None
                weight.grad.mul_(mask[name])
            optimizer.step()
    return {name: weight.detach() for name, weight in model.named_parameters()}, terms


def forever(anchors: Any) -> Any:
    """The batches of epoch after epoch."""
    epoch = 0
    while True:
        anchors.sampler.set_epoch(epoch)
        yield from list(anchors)
        epoch += 1


@pytest.mark.parametrize(
    ("loss", "accumulated", "packing"),
    [("example_mean", 1, False), ("example_mean", 4, True), ("token_mean", 4, False)],
)
def test_steps_are_those_of_a_plain_loop(
    workspace: Workspace, folder: Path, loss: Any, accumulated: int, packing: bool
) -> None:
    """The anchors are the examples that are not trained on, and the base model is the one before any step."""
    options = {"packing": packing, "batch_size": 3}
    module, noted = (
        workspace.module(dtype="float64", optimizer=sgd, loss=loss, training_prior=PRIOR),
        Losses("train_prior"),
    )
    run = trainer(folder, enable_checkpointing=False, accumulate_grad_batches=accumulated, callbacks=[noted])
    run.fit(module, datamodule=workspace.data(**options))
    expected, terms = plain_loop(workspace, loss, accumulated, **options)
    assert noted.found == pytest.approx(terms, abs=1e-6)
    assert terms[0] == pytest.approx(0.0, abs=1e-12)
    assert terms[-1] > 1e-3
    found = weights(module)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-7)  # the model's norms are float32


def test_the_base_model_is_not_trained(workspace: Workspace, folder: Path) -> None:
    """Of all weights, under autocast, with activations computed again: the term is zero before any step."""
    module = workspace.module(selection=None, training_prior=PRIOR, gradient_checkpointing=True)
    module.configure_model()
    modes: list[bool] = []
    block = module.model.get_submodule("model.layers.0.mlp")
    block.register_forward_pre_hook(lambda of, _: modes.append(of.training))
    noted = Losses("train_prior")
    run = trainer(folder, enable_checkpointing=False, precision="bf16-mixed", max_epochs=1, callbacks=[noted])
    run.fit(module, datamodule=workspace.data(selection=None, validation=None))
    assert noted.found[0] == pytest.approx(0.0, abs=1e-6)
    assert noted.found[-1] > 1e-3
    # two looks at padding, a batch twice, the base model, the anchors twice
    assert modes[:7] == [False, False, True, True, False, True, True]


def fitted(workspace: Workspace, folder: Path, checkpoint: Path | None) -> dict[str, Tensor]:
    """The weights of a fit that saves a checkpoint after every batch, unbroken or from such a checkpoint."""
    module = workspace.module(training_prior=PRIOR)
    run = trainer(folder, enable_checkpointing=False, accumulate_grad_batches=2, callbacks=[SaveOften(folder)])
    run.fit(module, datamodule=workspace.data(batch_size=3), ckpt_path=checkpoint, weights_only=True)
    return weights(module)


def test_resuming_gives_the_bits_of_an_unbroken_run(workspace: Workspace, tmp_path: Path) -> None:
    """In mid-epoch and in mid-accumulation: with the anchors that come next, and the base model of the first step."""
    unbroken = fitted(workspace, tmp_path / "unbroken", None)
    for number, name in enumerate(("0-2", "1-1")):
        found = fitted(workspace, tmp_path / str(number), tmp_path / "unbroken" / f"{name}.ckpt")
        assert all(torch.equal(found[weight], unbroken[weight]) for weight in unbroken)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1.0}, "model.training_prior.weight is -1.0; give 0"),
        ({"temperature": 0.0}, "model.training_prior.temperature is 0.0; give a positive number."),
    ],
)
def test_mistakes_are_refused(settings: dict[str, Any], message: str) -> None:
    """By the option's name."""
    with pytest.raises(UserError, match=message):
        TrainingPrior(**settings)


def test_data_without_a_pool_are_refused(workspace: Workspace, folder: Path) -> None:
    """A loader of one's own does not say what is left out."""
    module, data = workspace.module(training_prior=PRIOR), workspace.data()
    with pytest.raises(UserError, match="needs an InstructionDataModule"):
        trainer(folder).fit(module, data.train_dataloader(), data.val_dataloader())


def test_the_term_can_be_monitored(workspace: Workspace, folder: Path) -> None:
    """By a callback, as any metric that is logged; without a prior there is none."""
    stopping = EarlyStopping("train_prior", mode="min")
    options = {"max_epochs": 1, "callbacks": [stopping], "enable_checkpointing": False}
    trainer(folder, **options).fit(workspace.module(training_prior=PRIOR), datamodule=workspace.data())
    assert 0 < float(stopping.best_score) < 1
    with pytest.raises(UserError, match="monitors 'train_prior', which is not logged"):
        trainer(folder, **options).fit(workspace.module(), datamodule=workspace.data())


def test_anchors_follow_a_search_for_the_batch_size(workspace: Workspace, folder: Path) -> None:
    """A BatchSizeFinder trains before the fit has started; the anchors then come in batches of the size found."""
    finder = BatchSizeFinder("binsearch", steps_per_trial=1, init_val=4, max_trials=1)
    module, data = workspace.module(training_prior=PRIOR), workspace.data(batch_size=1)
    trainer(folder, max_epochs=1, callbacks=[finder], enable_checkpointing=True).fit(module, datamodule=data)
    assert module._prior is not None
    assert data.batch_size > 1
    assert len(module._prior.anchors(0)["example_id"]) == min(data.batch_size, POOL - len(CHOSEN))
