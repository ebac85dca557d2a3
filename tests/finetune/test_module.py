from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import Tensor
from torch.optim.lr_scheduler import LinearLR, LRScheduler

from dualsft.data.batches import TrainingBatches
from dualsft.data.records import read_records
from dualsft.errors import UserError
from dualsft.finetune import RecentCheckpoint
from dualsft.models.loading import load_model
from dualsft.objectives import example_losses, token_losses
from dualsft.selection import load_selection
from dualsft.sharding.strategy import FSDP2
from tests.world.data import write_jsonl
from tests.world.fits import weights
from tests.world.jobs import CHOSEN, SaveOften, Workspace, adamw, make_workspace, save_selection, trainer
from tests.world.models import save_tiny_model


def decaying(optimizer: torch.optim.Optimizer) -> LRScheduler:
    """A rate that falls with every step."""
    return LinearLR(optimizer, 1.0, 0.1, 12)


def reference(workspace: Workspace, mask: dict[str, Tensor], accumulated: int, clip: float) -> dict[str, Tensor]:
    """A plain loop over the same batches: dense float64 weights under masked gradients."""
    model = load_model(workspace.model, "float64")
    named = dict(model.named_parameters())
    before = {name: weight.detach().clone() for name, weight in named.items()}
    optimizer = adamw(named.values())
    schedule = decaying(optimizer)
    loader = workspace.data().train_dataloader()
    assert isinstance(loader.sampler, TrainingBatches)
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        for number, batch in enumerate(loader, 1):
            left_over = len(loader) % accumulated if number > len(loader) // accumulated * accumulated else 0
            (example_losses(model, batch).mean() / (left_over or accumulated)).backward()
            if number % accumulated and number < len(loader):
                continue
            for name, weight in named.items():
                assert weight.grad is not None
                weight.grad.mul_(mask[name])
            torch.nn.utils.clip_grad_norm_(named.values(), clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for name, weight in named.items():
                    weight.copy_(torch.where(mask[name], weight, before[name]))
    return {name: weight.detach() for name, weight in named.items()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("selected", [True, False])
def test_fit_equals_a_plain_loop(workspace: Workspace, folder: Path, selected: bool, checkpointing: bool) -> None:
    """Trainer.fit is dense AdamW under a masked gradient: same batches, accumulation, clipping, decay and schedule."""
    options: dict[str, Any] = {} if selected else {"selection": None}
    module = workspace.module(dtype="float64", lr_scheduler=decaying, gradient_checkpointing=checkpointing, **options)
    module.configure_model()
    passes: list[bool] = []
    module.model.get_submodule("model.layers.0.mlp").register_forward_pre_hook(lambda *_: passes.append(True))
    data = workspace.data(validation=None)
    trainer(folder, accumulate_grad_batches=2, gradient_clip_val=0.5).fit(module, datamodule=data)
    looks = 2  # at what padding makes of the losses, before the first step
    assert len(passes) == looks + 2 * len(data.train_dataloader()) * (2 if checkpointing else 1)
    mask = load_selection(workspace.selection).mask()
    if not selected:
        mask = {name: torch.ones_like(chosen) for name, chosen in mask.items()}
    expected = reference(workspace, mask, 2, 0.5)
    for name, weight in module.model.named_parameters():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-12)


def test_fit_changes_the_selected_weights_alone(workspace: Workspace, folder: Path) -> None:
    """After a fit, unselected weights have every bit of the base model's, and nearly all selected ones have moved."""
    module = workspace.module()
    trainer(folder).fit(module, datamodule=workspace.data())
    base, mask = load_model(workspace.model).state_dict(), load_selection(workspace.selection).mask()
    moved = 0
    for name, weight in weights(module).items():
        assert torch.equal(weight[~mask[name]], base[name][~mask[name]])
        moved += int((weight != base[name]).sum())
    assert moved > 0.9 * module.compact.num_selected


def test_validation_metrics_are_those_of_the_trained_weights(workspace: Workspace, folder: Path) -> None:
    """`val_*` are logged per supervised token over the whole validation set, and `train_loss` per batch."""
    module, data = workspace.module(), workspace.data()
    run = trainer(folder)
    run.fit(module, datamodule=data)
    logged = {name: value.item() for name, value in run.callback_metrics.items()}
    nll, hits = [], []
    with torch.no_grad():
        for row in data.validation_sets["validation"].dataset:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            logits = module.model.eval()(input_ids=ids).logits
            losses, targets = token_losses(logits, labels)
            nll += losses[targets != -100].tolist()
            hits += (logits[:, :-1].argmax(-1) == targets)[targets != -100].tolist()
    loss = sum(nll) / len(nll)
    assert logged.keys() == {"train_loss", "val_loss", "val_perplexity", "val_token_accuracy"}
    assert logged["val_loss"] == pytest.approx(loss, rel=1e-5)
    assert logged["val_perplexity"] == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-5)
    assert logged["val_token_accuracy"] == pytest.approx(sum(hits) / len(hits), rel=1e-5)


def test_fit_without_validation_data(workspace: Workspace, folder: Path) -> None:
    """A validation set is optional."""
    module = workspace.module()
    run = trainer(folder, max_epochs=1)
    run.fit(module, datamodule=workspace.data(validation=None))
    assert set(run.callback_metrics) == {"train_loss"}


def halves(workspace: Workspace, folder: Path) -> dict[str, str]:
    """The validation set in two unequal parts, under names that do not sort in the order given."""
    folder.mkdir()
    rows = list(read_records(workspace.validation))
    parts = {"zeta": rows[:4], "b-2": rows[4:]}
    return {name: write_jsonl(folder / f"{name}.jsonl", part) for name, part in parts.items()}


def test_validation_metrics_by_set(workspace: Workspace, folder: Path) -> None:
    """Named sets are logged each as if alone, and beside them their mean, while the same weights are trained."""
    found: dict[str, dict[str, float]] = {}
    trained = []
    sets = halves(workspace, folder)
    for name, source in {"both": sets, **sets}.items():
        module, run = workspace.module(), trainer(folder)
        run.fit(module, datamodule=workspace.data(validation=source))
        found[name] = {key: value.item() for key, value in run.callback_metrics.items()}
        trained.append(weights(module))
    both = found.pop("both")
    metrics = ("val_loss", "val_perplexity", "val_token_accuracy")
    assert both.keys() == {"train_loss", *(f"{metric}{part}" for metric in metrics for part in ("", "/zeta", "/b-2"))}
    for metric in metrics:
        assert [both[f"{metric}/{name}"] for name in sets] == [alone[metric] for alone in found.values()]
        assert both[metric] == pytest.approx(sum(alone[metric] for alone in found.values()) / 2, rel=1e-6)
    assert both["val_loss/zeta"] != both["val_loss/b-2"]
    for other in trained[1:]:
        assert_equal(other, trained[0])


def test_the_mean_over_the_sets_can_be_monitored(workspace: Workspace, folder: Path) -> None:
    """Early stopping and checkpoints go by `val_loss`, or by the loss of one set."""
    best = ModelCheckpoint(folder / "best", monitor="val_loss")
    stop = EarlyStopping("val_loss/b-2", mode="max", patience=1)
    run = trainer(folder, max_epochs=9, callbacks=[best, stop])
    run.fit(workspace.module(), datamodule=workspace.data(validation=halves(workspace, folder)))
    assert run.current_epoch == 2  # the loss falls, so that the second epoch is the first without a new maximum
    assert best.best_model_score == run.callback_metrics["val_loss"]


class Modes(Callback):
    """Notes whether the model trains, in training and in validation batches."""

    def __init__(self) -> None:
        self.training: set[bool] = set()
        self.validation: set[bool] = set()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.training.add(pl_module.model.training)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.validation.add(pl_module.model.training)


def test_dropout_is_for_training_alone(workspace: Workspace, folder: Path) -> None:
    """The model is in training mode for every training batch, and never for a validation batch."""
    modes = Modes()
    run = trainer(folder, callbacks=[modes], enable_checkpointing=False)
    run.fit(workspace.module(), datamodule=workspace.data())
    assert (modes.training, modes.validation) == ({True}, {False})


def test_schedule_follows_optimizer_steps(workspace: Workspace, folder: Path) -> None:
    """The rate moves once per optimizer step, not per batch or epoch; the optimizer is the one that was asked for."""
    module = workspace.module(optimizer=lambda p: torch.optim.SGD(p, lr=1.0), lr_scheduler=decaying)
    run = trainer(folder, accumulate_grad_batches=2)
    run.fit(module, datamodule=workspace.data())
    batches = len(workspace.data().train_dataloader())
    assert batches % 2
    assert run.global_step == 2 * (batches // 2 + 1)
    assert isinstance(run.optimizers[0], torch.optim.SGD)
    rate = run.optimizers[0].param_groups[0]["lr"]
    assert rate == pytest.approx(1 - 0.9 * run.global_step / 12)


def test_schedule_on_a_metric(workspace: Workspace, folder: Path) -> None:
    """A plateau schedule sees its metric once per epoch."""
    module = workspace.module(
        lr_scheduler=lambda o: ReduceLROnPlateau(o, monitor="val_loss", mode="max", patience=0, factor=0.5)
    )
    run = trainer(folder, max_epochs=3)
    run.fit(module, datamodule=workspace.data())
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(3e-3 / 4)


def test_default_optimizer(workspace: Workspace, folder: Path) -> None:
    """Without one given it is AdamW at 2e-5 without weight decay."""
    run = trainer(folder, max_epochs=1)
    run.fit(workspace.module(optimizer=None), datamodule=workspace.data())
    assert isinstance(run.optimizers[0], torch.optim.AdamW)
    group = run.optimizers[0].param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (2e-5, 0.0)


def test_bfloat16_weights_keep_float32_masters(tmp_path: Path) -> None:
    """A bf16 base stays bf16; its weights are the masters, rounded."""
    workspace = make_workspace(tmp_path, torch.bfloat16)
    module = workspace.module()
    trainer(tmp_path).fit(module, datamodule=workspace.data())
    named = dict(module.model.named_parameters())
    lost = 0
    for k, (name, master) in enumerate(zip(module.compact.names, module.compact.masters, strict=True)):
        index = module.compact.index(k)
        stored = named[name].flatten() if index is None else named[name].flatten()[index]
        assert (named[name].dtype, master.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(stored, master.bfloat16())
        lost += int((stored.float() != master).sum())
    assert lost > 0.9 * module.compact.num_selected


def test_mixed_precision(workspace: Workspace, folder: Path) -> None:
    """bf16-mixed computes in bf16 and leaves masters and weights in float32; the result is near the float32 one."""
    results = []
    for precision in ("32-true", "bf16-mixed"):
        module = workspace.module()
        run = trainer(folder, precision=precision)
        run.fit(module, datamodule=workspace.data())
        assert {master.dtype for master in module.compact.masters} == {torch.float32}
        assert {weight.dtype for weight in module.model.parameters()} == {torch.float32}
        results.append(run.callback_metrics["val_loss"].item())
    assert results[0] != results[1]
    assert results[1] == pytest.approx(results[0], rel=2e-2)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_precision_that_would_convert_the_masters_is_refused(
    workspace: Workspace, folder: Path, precision: Any
) -> None:
    """The user is sent to model.dtype, before the model is loaded."""
    module = workspace.module()
    run = trainer(folder, precision=precision)
    with pytest.raises(UserError, match=rf"trainer.precision is {precision}.*model\.dtype\.$"):
        run.fit(module, datamodule=workspace.data())
    assert not list(module.parameters())


def test_precisions_of_shards(workspace: Workspace, folder: Path) -> None:
    """A scaled loss is no choice where ranks would have to agree on the scale."""
    module = workspace.module()
    module.trainer = trainer(folder, strategy=FSDP2(), precision="16-true")
    with pytest.raises(UserError, match=r"is 16-true, .*give one of 32-true, bf16-mixed, and set"):
        module.setup("fit")


def test_clipping_for_a_fused_optimizer_under_mixed_precision_is_refused(workspace: Workspace, folder: Path) -> None:
    """Lightning would raise an exception at the first step."""
    module = workspace.module(optimizer=partial(torch.optim.AdamW, fused=True))
    run = trainer(folder, precision="bf16-mixed", gradient_clip_val=0.5)
    with pytest.raises(UserError, match=r"gradient_clip_val is 0.5, but under .* bf16-mixed gradients cannot"):
        run.fit(module, datamodule=workspace.data())


def test_several_processes_are_refused(workspace: Workspace, folder: Path) -> None:
    """The hooks know nothing of other processes' gradients, unless the weights are in shards."""
    module = workspace.module()
    module.trainer = trainer(folder, devices=2, strategy="ddp_spawn")
    with pytest.raises(UserError, match=r"2 processes under DDPStrategy; set trainer\.strategy to ddp"):
        module.setup("fit")


def test_selection_for_another_model_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    """The message names the model that the selection was made for, and the one given."""
    other = save_tiny_model(tmp_path / "other", seed=1)
    module = workspace.module(model_name_or_path=other)
    with pytest.raises(UserError) as caught:
        trainer(tmp_path).fit(module, datamodule=workspace.data())
    assert workspace.model in str(caught.value)
    assert other in str(caught.value)


def test_validation_set_without_responses_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    """Lightning would skip it in silence."""
    empty = write_jsonl(tmp_path / "empty.jsonl", [{"prompt": "1 + 1?", "response": ""}])
    for given, key in ((empty, "data.validation"), ({"a": workspace.train, "b": empty}, "data.validation.b")):
        with pytest.raises(UserError, match=rf"No example of {key} has .*\(0 ok, 1 empty, 0 truncated\)"):
            trainer(tmp_path).fit(workspace.module(), datamodule=workspace.data(validation=given))


def resumable(
    workspace: Workspace, folder: Path, callback: Callback, resume: Path | None, **data: Any
) -> dict[str, Tensor]:
    """The final weights of a run with accumulation, clipping and a schedule, unbroken or resumed."""
    torch.manual_seed(0 if resume is None else 1)
    module = workspace.module(lr_scheduler=decaying)
    run = trainer(folder, accumulate_grad_batches=2, gradient_clip_val=0.5, callbacks=[callback])
    run.fit(module, datamodule=workspace.data(**data), ckpt_path=resume, weights_only=True)
    return weights(module)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Every weight has the same bits."""
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.slow
def test_a_schedule_that_asks_for_the_run_s_length_resumes(workspace: Workspace, folder: Path) -> None:
    """In mid-epoch too: to ask sets up the data, which must not be before the place to go on from is known."""

    def run(resume: Path | None) -> dict[str, Tensor]:
        module = workspace.module(lr_scheduler=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.01, total_steps=99))
        callback = ModelCheckpoint(folder / "a", filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer(folder, callbacks=[callback]).fit(
            module, datamodule=workspace.data(), ckpt_path=resume, weights_only=True
        )
        return weights(module)

    unbroken = run(None)
    for path in sorted((folder / "a").glob("*.ckpt"))[:-1]:
        assert_equal(run(path), unbroken)


def test_recent_checkpoints_leave_out_what_a_validation_follows(workspace: Workspace, folder: Path) -> None:
    """Of the batches of an epoch those at whose end the run validates are left out, for none else."""
    every: dict[str, Any] = {"every_n_train_steps": 1, "save_top_k": -1}
    callbacks = [
        RecentCheckpoint(folder / "a", filename="{step}", **every),
        ModelCheckpoint(folder / "b", filename="{step}", **every),
    ]
    trainer(folder, callbacks=callbacks, val_check_interval=2, max_epochs=1).fit(
        workspace.module(), datamodule=workspace.data()
    )
    recent, all_steps = ({path.stem for path in (folder / name).glob("*.ckpt")} for name in ("a", "b"))
    assert recent == {step for step in all_steps if int(step.split("=")[1]) % 2}
    assert len(all_steps) >= 2


@pytest.mark.parametrize("batches", [0, -1])
def test_accumulation_over_no_batch_is_refused(workspace: Workspace, folder: Path, batches: int) -> None:
    """A negative number would train uphill."""
    with pytest.raises(UserError, match=rf"accumulate_grad_batches is {batches}; give at least 1"):
        trainer(folder, accumulate_grad_batches=batches).fit(workspace.module(), datamodule=workspace.data())


def test_resuming_gives_the_bits_of_an_unbroken_run(workspace: Workspace, folder: Path) -> None:
    """From a ModelCheckpoint after any optimizer step, in mid-epoch or at its end."""
    callback = ModelCheckpoint(folder / "a", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    unbroken = resumable(workspace, folder, callback, None)
    saved = sorted((folder / "a").glob("*.ckpt"))
    assert len(saved) == 6
    for path in saved[:-1]:
        again = ModelCheckpoint(folder / "a", filename="{step}", every_n_train_steps=1, save_top_k=-1)
        assert_equal(resumable(workspace, folder, again, path), unbroken)


def test_a_deterministic_fit_has_the_same_bits(workspace: Workspace, folder: Path) -> None:
    """`--trainer.deterministic true` refuses every operation whose bits may differ on some device; a fit has none."""
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    expected, module = workspace.module(), workspace.module()
    trainer(folder, **options).fit(expected, datamodule=workspace.data())
    try:
        trainer(folder, deterministic=True, **options).fit(module, datamodule=workspace.data())
    finally:
        torch.use_deterministic_algorithms(False)
    assert_equal(weights(module), weights(expected))


@pytest.mark.slow
def test_resuming_with_named_validation_sets(workspace: Workspace, folder: Path) -> None:
    """From a checkpoint after any batch but the last, the weights are those of a run with one validation set."""
    unbroken = resumable(workspace, folder, SaveOften(folder / "a"), None)
    sets = halves(workspace, folder / "sets")
    assert_equal(resumable(workspace, folder, SaveOften(folder / "b"), None, validation=sets), unbroken)
    saved = sorted((folder / "b").glob("*.ckpt"))
    assert len(saved) > 6
    for path in saved[:-1]:
        assert_equal(resumable(workspace, folder, SaveOften(folder / "c"), path, validation=sets), unbroken)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second"), [("0-0", "0-2"), ("0-1", "1-2"), ("0-2", "0-3"), ("0-4", "1-2"), ("1-0", "1-1")]
)
def test_resuming_in_the_middle_of_an_accumulation(workspace: Workspace, folder: Path, first: str, second: str) -> None:
    """A checkpoint after any batch keeps the gradients that no step has used, also when the run is resumed twice."""
    unbroken = resumable(workspace, folder, SaveOften(folder / "a"), None)
    once = resumable(workspace, folder, SaveOften(folder / "b"), folder / "a" / f"{first}.ckpt")
    twice = resumable(workspace, folder, SaveOften(folder / "c"), folder / "b" / f"{second}.ckpt")
    assert_equal(once, unbroken)
    assert_equal(twice, unbroken)


def test_checkpoint_holds_compact_state_only(workspace: Workspace, folder: Path) -> None:
    """A checkpoint is the masters and the optimizer's state for them: 12 bytes per selected weight, plus a little."""
    module = workspace.module()
    callback = ModelCheckpoint(folder)
    trainer(folder, callbacks=[callback]).fit(module, datamodule=workspace.data())
    state = torch.load(callback.best_model_path, weights_only=True)
    selected = module.compact.num_selected
    assert list(state["state_dict"]) == [f"compact.masters.{k}" for k in range(len(module.compact.names))]
    assert sum(master.numel() for master in state["state_dict"].values()) == selected
    moments = [v for s in state["optimizer_states"][0]["state"].values() for n, v in s.items() if n != "step"]
    assert sum(moment.numel() for moment in moments) == 2 * selected
    assert state["dualsft"]["gradients"] == {}
    assert Path(callback.best_model_path).stat().st_size < 12 * selected + 40_000


@pytest.mark.parametrize("what", ["weights", "examples", "base", "foreign"])
def test_resuming_with_another_selection_is_refused(workspace: Workspace, tmp_path: Path, what: str) -> None:
    """A checkpoint of other weights (as many of them), other examples, another base or program is not taken up."""
    callback = ModelCheckpoint(tmp_path)
    trainer(tmp_path, max_epochs=1, callbacks=[callback]).fit(workspace.module(), datamodule=workspace.data())
    mask, chosen, inputs = load_selection(workspace.selection).mask(), CHOSEN, workspace
    if what == "weights":
        mask = {name: chosen.flatten().roll(1).view(chosen.shape) for name, chosen in mask.items()}
    if what == "examples":
        chosen = [*CHOSEN[:-1], 23]
    if what == "base":
        inputs = replace(workspace, model=save_tiny_model(tmp_path / "base", seed=1))
    if what == "foreign":
        state = torch.load(callback.best_model_path, weights_only=True)
        del state["dualsft"]
        torch.save(state, callback.best_model_path)
    other = save_selection(tmp_path / "selection", inputs, mask, chosen)
    with pytest.raises(UserError, match="another base model or another selection"):
        trainer(tmp_path).fit(
            workspace.module(model_name_or_path=inputs.model, selection=other),
            datamodule=workspace.data(selection=other),
            ckpt_path=callback.best_model_path,
            weights_only=True,
        )


def test_validate_after_fit_sees_the_trained_weights(workspace: Workspace, folder: Path) -> None:
    """The same module validates with what it has learnt, and so does a fresh one from the checkpoint."""
    module, callback = workspace.module(), ModelCheckpoint(folder)
    run = trainer(folder, callbacks=[callback])
    run.fit(module, datamodule=workspace.data())
    loss = run.callback_metrics["val_loss"].item()
    after = trainer(folder).validate(module, datamodule=workspace.data(), verbose=False)
    loaded = trainer(folder, callbacks=[ModelCheckpoint(folder)]).validate(
        workspace.module(),
        datamodule=workspace.data(),
        ckpt_path=callback.best_model_path,
        weights_only=True,
        verbose=False,
    )
    base = trainer(folder).validate(workspace.module(), datamodule=workspace.data(), verbose=False)
    assert after[0]["val_loss"] == loaded[0]["val_loss"] == pytest.approx(loss)
    assert base[0]["val_loss"] > loss + 0.1
