"""A fit on ranks, each with shards of the weights, is the fit of one process."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from dualsft.errors import UserError
from dualsft.finetune import EndOfTraining, ExportModel
from dualsft.finetune.prior import TrainingPrior
from dualsft.models.loading import load_model
from dualsft.selection import load_selection
from dualsft.sharding.groups import world_size
from dualsft.sharding.strategy import DDP, FSDP2, launch_ranks
from tests.finetune.test_losses import LOSSES, STEPS, halving, plain_loop, sgd
from tests.sharding.test_save import assert_same_files
from tests.world.data import random_mask
from tests.world.fits import Case, Fitted, SaveFirst, all_fitted, assert_same_fit, fitted, weights
from tests.world.jobs import CHOSEN, SaveOften, Workspace, make_workspace, save_selection, trainer
from tests.world.ranks import run_on_ranks

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


def average(_: Path) -> EMAWeightAveraging:
    """A moving average of the weights."""
    return EMAWeightAveraging(decay=0.7)


def stochastic_average(_: Path) -> StochasticWeightAveraging:
    """An average over epochs."""
    return StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1, annealing_epochs=1)


def best(folder: Path) -> ModelCheckpoint:
    """A checkpoint of the weights with the highest loss, which are not the last."""
    return ModelCheckpoint(folder, monitor="val_loss", mode="max")


saved = {"enable_checkpointing": True}
CASES = {
    "batches of three": Case(data={"batch_size": 3}),
    "clipped by norm": Case(trainer={"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}),
    "clipped by value": Case(trainer={"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "mean over tokens": Case(module={"loss": "token_mean"}, trainer={"accumulate_grad_batches": 3}),
    "packed": Case(data={"packing": True}),
    "left over": Case(data={"packing": True, "batch_size": 3}, trainer={"accumulate_grad_batches": 4}),
}
MORE_CASES = {
    "all weights": Case(module={"selection": None}),
    "recomputed": Case(module={"gradient_checkpointing": True}),
    "moving average": Case(callbacks=[average]),
    "stochastic average": Case(callbacks=[stochastic_average]),
    "on the host": Case(trainer={"gradient_clip_val": 0.5}, strategy={"cpu_offload": True}),
    "prior": Case({"training_prior": TrainingPrior(weight=0.7)}, {"batch_size": 2}, {"accumulate_grad_batches": 2}),
    "prior, all weights": Case({"training_prior": TrainingPrior(weight=0.7), "selection": None}, {"packing": True}),
    "best": Case({"export": "best"}, {}, saved, [best]),
}
LEFT_OVER = ("one left over", "two left over", "three left over")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A base model, data and a selection; nothing may be written there."""
    return make_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="module")
def alone(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Fitted]:
    """The fits of all cases on one process."""
    return all_fitted(workspace, tmp_path_factory.mktemp("alone"), CASES | MORE_CASES)


def check(workspace: Workspace, folder: Path, cases: dict[str, Case], count: int, alone: dict[str, Fitted]) -> None:
    """Fit on ranks, and compare with the fits on one process."""
    found = run_on_ranks(count, all_fitted, workspace, folder, cases)[0]
    base, mask = load_model(workspace.model).state_dict(), load_selection(workspace.selection).mask()
    for name, case in cases.items():
        assert_same_fit(found[name], alone[name])
        for weight, chosen in mask.items() if "selection" not in case.module else ():
            assert torch.equal(found[name].weights[weight][~chosen], base[weight][~chosen])


def test_fits_of_all_kinds(workspace: Workspace, alone: dict[str, Fitted], tmp_path: Path) -> None:
    """Every batch's loss, the weights and the metrics are; weights that are not selected keep every bit.

    With three ranks neither batches nor tensors divide; rows are fewer than ranks, and some ranks hold no row.
    """
    check(workspace, tmp_path, CASES | MORE_CASES, 3, alone)


@pytest.mark.parametrize("count", [1, 4])
def test_other_numbers_of_ranks(workspace: Workspace, alone: dict[str, Fitted], tmp_path: Path, count: int) -> None:
    """One rank, and more ranks than a batch has rows."""
    names = ("batches of three", "clipped by norm", "left over")
    check(workspace, tmp_path, {name: CASES[name] for name in names}, count, alone)


def by_replicas(cases: dict[str, Case]) -> dict[str, Case]:
    """The same fits, with all of the model on every rank."""
    return {name: replace(case, ranks=DDP) for name, case in cases.items() if not case.strategy}


def test_fits_by_replicas(workspace: Workspace, alone: dict[str, Fitted], tmp_path: Path) -> None:
    """Fits of all kinds are those of one process too where each rank holds the whole model."""
    check(workspace, tmp_path, by_replicas(CASES | MORE_CASES), 3, alone)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_bfloat16(tmp_path: Path, precision: str) -> None:
    """Weights stored in bfloat16, and computing in it, are within its rounding; what is not selected keeps its bits."""
    dtype = torch.bfloat16 if precision == "32-true" else torch.float32
    stored = str(dtype).removeprefix("torch.")  # not auto, as other processes may find no units for bfloat16
    workspace, case = make_workspace(tmp_path, dtype), Case({"dtype": stored}, trainer={"precision": precision})
    found = run_on_ranks(2, fitted, workspace, tmp_path / "found", case)[0]
    assert_same_fit(found, fitted(workspace, tmp_path / "expected", case), 2e-2)
    base, mask = load_model(workspace.model).state_dict(), load_selection(workspace.selection).mask()
    for name, chosen in mask.items():
        assert found.weights[name].dtype == dtype
        assert torch.equal(found.weights[name][~chosen], base[name][~chosen])


def joined_first(workspace: Workspace, folder: Path) -> Fitted:
    """A fit by ranks that have joined, and loaded the model, before the trainer runs."""
    module = workspace.module()
    run = trainer(folder, strategy=FSDP2(), devices=world_size(), enable_checkpointing=False)
    launch_ranks(run, module)
    module.configure_model()
    mesh = module.device_mesh
    run.fit(module, datamodule=workspace.data())
    assert module.device_mesh is mesh
    return Fitted([], weights(module), {}, {})


def joined_and_left_over(workspace: Workspace, folder: Path) -> tuple[Fitted, dict[str, Fitted]]:
    """A fit of `joined_first`, and one for each loss and number of batches that an epoch leaves to its last step."""
    common: dict[str, Any] = {"dtype": "float64", "optimizer": sgd, "lr_scheduler": halving}
    cases = {
        f"{loss}, {name}": Case(
            {"loss": loss, **common}, {"batch_size": 3}, {"gradient_clip_val": 1.5, **STEPS[name].options()}
        )
        for loss in LOSSES
        for name in LEFT_OVER
    }
    return joined_first(workspace, folder / "joined"), all_fitted(workspace, folder, cases)


def test_two_ranks_join_first_and_take_short_steps(workspace: Workspace, tmp_path: Path) -> None:
    """Ranks may join, for what is to be looked at first, before the trainer runs: the fit is the same.

    An epoch's last, shorter step follows the mean over its own batches, as a plain loop takes it on one process.
    """
    joined, short = run_on_ranks(2, joined_and_left_over, workspace, tmp_path)[0]
    expected = fitted(workspace, tmp_path / "expected", Case())
    for name, weight in expected.weights.items():
        torch.testing.assert_close(joined.weights[name], weight, rtol=0, atol=1e-5)
    for case, found in short.items():
        loss, _, steps = case.partition(", ")
        for name, weight in plain_loop(workspace, loss, STEPS[steps], batch_size=3)[0].items():
            torch.testing.assert_close(found.weights[name], weight, rtol=0, atol=1e-7)  # norms are float32


ACCUMULATED = {"accumulate_grad_batches": 2, **saved}


def tensors(tree: Any, place: str = "") -> dict[str, Tensor]:
    """Every tensor in nested containers, by its place."""
    if isinstance(tree, Tensor):
        return {place: tree}
    parts = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return {where: found for key, part in parts for where, found in tensors(part, f"{place}/{key}").items()}


def read(path: Path) -> dict[str, Any]:
    """A checkpoint, without pickled code."""
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


def goes_on(
    workspace: Workspace, folder: Path, names: list[str], strategy: Callable[..., Strategy] = FSDP2
) -> dict[str, Fitted]:
    """Goes on from each of these checkpoints, after saving what it goes on from."""
    common = Case({}, {"batch_size": 3}, ACCUMULATED, [average, SaveFirst], ranks=strategy)
    cases = {name: replace(common, resume=folder / f"{name}.ckpt") for name in names}
    return all_fitted(workspace, folder / "resumed", cases)


@pytest.mark.parametrize(("saving", "going_on", "strategy"), [(2, 1, FSDP2), (2, 3, FSDP2), (2, 1, DDP), (2, 3, DDP)])
def test_checkpoints_move_between_numbers_of_ranks(
    workspace: Workspace, tmp_path: Path, saving: int, going_on: int, strategy: Callable[..., Strategy]
) -> None:
    """In mid-accumulation and in mid-epoch: masters, averages, optimizer and gradients to the bit, and then the end.

    The file is that of one process, tensor by tensor.
    """
    case = Case({}, {"batch_size": 3}, ACCUMULATED, [average, SaveOften], ranks=strategy)
    one = fitted(workspace, tmp_path / "one", case)
    many = run_on_ranks(saving, fitted, workspace, tmp_path / "many", case)[0]
    assert_same_fit(many, one)
    for path in sorted((tmp_path / "one").glob("*.ckpt")):
        written, expected = (tensors(read(folder / path.name)) for folder in (tmp_path / "many", path.parent))
        assert written.keys() == expected.keys()
        for place, tensor in expected.items():
            torch.testing.assert_close(written[place], tensor, rtol=1e-3, atol=1e-5)
    names = ["0-0", "0-1", "1-2"]
    if going_on == 1:
        found = goes_on(workspace, tmp_path / "many", names)
    else:
        found = run_on_ranks(going_on, goes_on, workspace, tmp_path / "many", names, strategy)[0]
    for name in names:
        before = read(tmp_path / "many" / f"{name}.ckpt")
        after = read(tmp_path / "many" / "resumed" / name / "restored.ckpt")
        assert len(tensors(before["dualsft"])) == (0 if name == "0-1" else len(tensors(before["state_dict"])))
        for part in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "dualsft"):
            restored, kept = tensors(after[part]), tensors(before[part])
            assert restored.keys() == kept.keys()
            assert all(torch.equal(restored[place], tensor) for place, tensor in kept.items()), part
        for weight, expected_weight in one.weights.items():
            torch.testing.assert_close(found[name].weights[weight], expected_weight, rtol=0, atol=1e-5)
        assert found[name].figures["tokens"] == one.figures["tokens"]


def ending(_: Path) -> EndOfTraining:
    """Ends a run that has nothing left to train."""
    return EndOfTraining()


def lbfgs(parameters: Any) -> torch.optim.Optimizer:
    """Works on inner products of whole tensors."""
    return torch.optim.LBFGS(parameters)


def bursting(parameters: Any) -> torch.optim.Optimizer:
    """After one step no loss is finite."""
    return torch.optim.SGD(parameters, lr=1e30)


REFUSED = {
    "LBFGS works with norms and products of whole tensors": Case({"optimizer": lbfgs}),
    "The training loss became nan in epoch 0": Case({"optimizer": bursting}),
    "missing.jsonl does not exist": Case(data={"validation": "missing.jsonl"}),
}


def refusals(workspace: Workspace, folder: Path, strategy: Callable[..., Strategy]) -> list[str]:
    """What each of the fits that cannot be done fails with."""
    found = []
    for case in REFUSED.values():
        with pytest.raises(UserError) as error:
            fitted(workspace, folder, replace(case, ranks=strategy))
        found.append(str(error.value))
    return found


@pytest.mark.parametrize("strategy", [FSDP2, DDP])
def test_what_fails_fails_on_all_ranks(workspace: Workspace, tmp_path: Path, strategy: Callable[..., Strategy]) -> None:
    """In the same sentence, and no rank waits for another."""
    for found in run_on_ranks(2, refusals, workspace, tmp_path, strategy):
        for words, message in zip(REFUSED, found, strict=True):
            assert words in message


def export(folder: Path) -> ExportModel:
    """Exports into the fit's folder."""
    return ExportModel(str(folder))


def unprefixed(folder: Path) -> Workspace:
    """One whose base model's files have other names than its parameters."""
    made = make_workspace(folder)
    model: Any = load_model(made.model)
    model.model.save_pretrained(made.model)
    again = save_selection(folder / "again", made, random_mask(model, 0.3), CHOSEN)
    return replace(made, selection=again)


BASES: dict[str, Callable[[Path], Workspace]] = {
    "float32": make_workspace,
    "bfloat16": partial(make_workspace, dtype=torch.bfloat16),
    "unprefixed": unprefixed,
}


@pytest.mark.parametrize(
    ("base", "count", "strategy"),
    [
        ("float32", 3, FSDP2),
        ("bfloat16", 1, FSDP2),
        ("unprefixed", 2, FSDP2),
        ("float32", 2, DDP),
        ("bfloat16", 3, DDP),
    ],
)
def test_export_is_that_of_one_process(
    tmp_path: Path, base: str, count: int, strategy: Callable[..., Strategy]
) -> None:
    """From the same masters: every file of ``model/`` and the delta have the same bytes, on any number of ranks."""
    workspace, module = BASES[base](tmp_path), {"dtype": "bfloat16" if base == "bfloat16" else "float32"}
    fitted(workspace, tmp_path / "saved", Case(module, trainer=saved, callbacks=[SaveOften]))
    case = Case(module, trainer=saved, callbacks=[ending, export], resume=tmp_path / "saved" / "1-4.ckpt")
    case = replace(case, ranks=strategy)
    fitted(workspace, tmp_path / "expected", case)
    found, expected = tmp_path / "found", tmp_path / "expected"
    run_on_ranks(count, fitted, workspace, found, case)
    assert sorted(path.name for path in found.iterdir()) == ["delta.safetensors", "model"]
    assert_same_files(found / "model", expected / "model")
    assert (found / "delta.safetensors").read_bytes() == (expected / "delta.safetensors").read_bytes()
    assert (found / "delta.safetensors").stat().st_size > 10_000
