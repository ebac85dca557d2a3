"""Lightning's callbacks that average weights, unchanged, on compact masters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from torch import Tensor

from dualsft.errors import UserError
from dualsft.models.loading import load_model
from dualsft.objectives import example_losses, token_losses
from dualsft.selection import load_selection
from tests.world.fits import weights
from tests.world.jobs import Workspace, make_workspace, trainer

AVERAGES: dict[str, Any] = {
    "EMA": lambda: EMAWeightAveraging(decay=0.7),
    "mean": WeightAveraging,
    "SWA": lambda: StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1, annealing_epochs=1),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


def adam(parameters: Any) -> torch.optim.Optimizer:
    """Without decay, so that a weight whose gradient is masked stays."""
    return torch.optim.Adam(parameters, lr=3e-3)


class Dense(LightningModule):
    """The reference: an ordinary module with dense weights and masked gradients."""

    def __init__(self, base: str, mask: dict[str, Tensor]) -> None:
        super().__init__()
        self.model, self.mask = load_model(base, "float64").train(), mask

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adam(self.model.parameters())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return example_losses(self.model, batch).mean()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for name, weight in self.model.named_parameters():
            assert weight.grad is not None
            weight.grad.mul_(self.mask[name])

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        nll, targets = token_losses(self.model(batch["input_ids"]).logits, batch["labels"])
        self.log("val_loss", nll.sum() / (targets != -100).sum())


class Losses(Callback):
    """Notes each validation's loss."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.found.append(trainer.callback_metrics["val_loss"].item())


@pytest.mark.slow
@pytest.mark.parametrize("average", AVERAGES)
def test_averages_are_those_of_dense_weights(workspace: Workspace, folder: Path, average: str) -> None:
    """In float64 the final weights and the losses of validations on the way are those of a dense module."""
    mask = load_selection(workspace.selection).mask()
    dense, module = Dense(workspace.model, mask), workspace.module(dtype="float64", optimizer=adam)
    found = []
    for net in (dense, module):
        losses = Losses()
        trainer(folder, max_epochs=3, callbacks=[AVERAGES[average](), losses], enable_checkpointing=False).fit(
            net, datamodule=workspace.data(batch_tokens=4000)
        )
        found.append(losses.found)
    assert found[0] == pytest.approx(found[1], rel=1e-6)  # metrics are float32
    plain = workspace.module(dtype="float64", optimizer=adam)
    trainer(folder, max_epochs=3).fit(plain, datamodule=workspace.data(batch_tokens=4000))
    expected = dict(dense.model.named_parameters())
    assert max(float((w - weights(plain)[n]).abs().max()) for n, w in weights(module).items()) > 1e-4
    for name, weight in weights(module).items():
        torch.testing.assert_close(weight, expected[name].detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("average", AVERAGES)
def test_unselected_weights_keep_every_bit(tmp_path: Path, average: str) -> None:
    """An average of equal numbers is not always that number: masters alone are averaged, bf16 weights follow."""
    workspace = make_workspace(tmp_path, torch.bfloat16)
    module = workspace.module(optimizer=adam)
    trainer(tmp_path, callbacks=[AVERAGES[average]()], enable_checkpointing=False).fit(
        module, datamodule=workspace.data()
    )
    base, mask = load_model(workspace.model).state_dict(), load_selection(workspace.selection).mask()
    for name, weight in weights(module).items():
        assert torch.equal(weight[~mask[name]], base[name][~mask[name]])
    for k, name in enumerate(module.compact.names):
        assert torch.equal(weights(module)[name][mask[name]], module.compact.masters[k].bfloat16())


def averaged(workspace: Workspace, folder: Path, average: str, resume: Path | None) -> dict[str, Tensor]:
    """The final weights of a run that saves after every step, unbroken or resumed."""
    saving = ModelCheckpoint(folder / "saved", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    module = workspace.module(optimizer=adam)
    run = trainer(folder, callbacks=[AVERAGES[average](), saving], accumulate_grad_batches=2)
    run.fit(module, datamodule=workspace.data(), ckpt_path=resume, weights_only=True)
    return weights(module)


@pytest.mark.slow
@pytest.mark.parametrize("average", ["EMA", "mean"])
def test_resuming_goes_on_with_the_averages(workspace: Workspace, folder: Path, average: str) -> None:
    """From any step, in mid-epoch too, to the bits of an unbroken run; checkpoints hold masters and averages alone."""
    unbroken = averaged(workspace, folder, average, None)
    saved = sorted((folder / "saved").glob("*.ckpt"))
    assert len(saved) == 6
    selected = int(sum(chosen.sum() for chosen in load_selection(workspace.selection).mask().values()))
    assert saved[0].stat().st_size < 4 * 4 * selected + 60_000
    for path in saved[:-1]:
        found = averaged(workspace, folder, average, path)
        assert [name for name in found if not torch.equal(found[name], unbroken[name])] == []


def test_weights_of_an_epoch_s_end_are_resumed_from(workspace: Workspace, folder: Path) -> None:
    """SWA, which works by epochs, goes on from an epoch's end with its averages and its learning rate."""
    found = []
    for resume in (None, folder / "saved" / "epoch=0.ckpt", folder / "saved" / "epoch=1.ckpt"):
        saving = ModelCheckpoint(folder / "saved", filename="{epoch}", save_top_k=-1)
        module = workspace.module(optimizer=adam)
        run = trainer(folder, callbacks=[AVERAGES["SWA"](), saving], max_epochs=3)
        run.fit(module, datamodule=workspace.data(), ckpt_path=resume, weights_only=True)
        found.append(weights(module))
    assert all(torch.equal(found[0][name], resumed[name]) for resumed in found[1:] for name in resumed)


def test_averaging_buffers_apart_is_refused(workspace: Workspace, folder: Path) -> None:
    """The one setting under which Lightning's callback cannot serve ends in one sentence, before anything is loaded."""
    module, run = workspace.module(), trainer(folder, callbacks=[EMAWeightAveraging(use_buffers=False)])
    with pytest.raises(UserError, match="EMAWeightAveraging cannot work with use_buffers=false"):
        run.fit(module, datamodule=workspace.data())
