"""Checkpoint files: whole or absent, and damaged ones passed over."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dualsft.errors import UserError
from dualsft.finetune import checkpoint_files
from dualsft.finetune.checkpoint_files import WholeCheckpoints, damage, newest_whole
from tests.world.damage import DAMAGE, damage_file, full_disk
from tests.world.fits import weights
from tests.world.jobs import SaveOften, Workspace, fit, trainer

PARTS: dict[str, Any] = {name: {} for name in ("state_dict", "loops", "callbacks", "dualsft")}
PARTS |= {"optimizer_states": [], "lr_schedulers": [], "w": torch.arange(1000.0)}


def save(path: Path, moment: int, **parts: Any) -> Path:
    """A checkpoint that is as old as said."""
    WholeCheckpoints().save_checkpoint({**PARTS, **parts}, path)
    os.utime(path, (moment, moment))
    return path


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_passed_over(
    tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The next older one is taken; the damaged file is no checkpoint any more, and cannot be loaded by name either."""
    older, newer = save(tmp_path / "a" / "old.ckpt", 1), save(tmp_path / "a" / "new.ckpt", 2)
    (tmp_path / "a" / "third.ckpt.partial").write_bytes(b"half")
    assert newest_whole([tmp_path, tmp_path / "a"]) == newer
    damage_file(newer, how)
    with pytest.raises(UserError, match=r"new\.ckpt is damaged \(.+\); give another checkpoint"):
        WholeCheckpoints().load_checkpoint(newer, weights_only=True)
    assert newest_whole([tmp_path]) == older
    assert "new.ckpt is damaged" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["new.ckpt.damaged", "old.ckpt"]


def test_a_checkpoint_that_no_run_can_resume_from_is_left_alone(tmp_path: Path) -> None:
    """One of weights alone, one that is no dictionary, and one whose best weights are gone, if these are needed."""
    bare = tmp_path / "bare.ckpt"
    torch.save({"state_dict": {}}, bare)
    torch.save([1], tmp_path / "list.ckpt")
    assert newest_whole([tmp_path]) is None
    best = save(tmp_path / "best.ckpt", 1)
    state = {"callbacks": {"ModelCheckpoint": {"monitor": "val_loss", "best_model_path": str(best)}}}
    recent = save(tmp_path / "recent.ckpt", 2**32, **state)
    assert newest_whole([tmp_path], needs_best=True) == recent
    damage_file(best, "flipped")
    assert newest_whole([tmp_path], needs_best=True) is None
    assert newest_whole([tmp_path]) == recent
    assert bare.is_file()


def test_files_are_lightnings_and_older_ones_are_read(tmp_path: Path) -> None:
    """torch.load reads what we write, and a file that torch.save wrote is whole."""
    path = save(tmp_path / "new" / "a.ckpt", 1)
    assert torch.equal(torch.load(path, weights_only=True)["w"], PARTS["w"])
    torch.save(PARTS, tmp_path / "b.ckpt")
    assert damage(tmp_path / "b.ckpt") is None


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """The message names the folder of the checkpoints, not the temporary one, and nothing is left beside."""
    path = save(tmp_path / "a.ckpt", 1, state="first")
    with pytest.raises(UserError, match=rf"^{tmp_path} cannot be written \(File too large\)"), full_disk(2_000):
        save(path, 2, state="second")
    assert torch.load(path, weights_only=True)["state"] == "first"
    assert [found.name for found in tmp_path.iterdir()] == ["a.ckpt"]


def test_every_checkpoint_of_a_fit_is_written_so(
    workspace: Workspace, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that a user's own callback saves, too; a writer of the user's stays."""
    written: list[Path] = []
    original = checkpoint_files.replacing

    def noting(path: Path) -> Any:
        written.append(path)
        return original(path)

    monkeypatch.setattr(checkpoint_files, "replacing", noting)
    run = trainer(folder, max_epochs=1, callbacks=[SaveOften(folder)])
    module = workspace.module()
    run.fit(module, datamodule=workspace.data())
    assert sorted({path.name for path in written}) == sorted(path.name for path in folder.rglob("*.ckpt"))
    assert weights(module)


def dying(monkeypatch: pytest.MonkeyPatch, call: int, end: Callable[[Path], None]) -> None:
    """Have a run die after the n-th checkpoint, once something has been done to the file."""
    save_checkpoint, calls = WholeCheckpoints.save_checkpoint, []

    def deadly(self: Any, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        save_checkpoint(self, checkpoint, path, storage_options)
        calls.append(path)
        if len(calls) == call:
            end(Path(path))
            raise KeyboardInterrupt

    monkeypatch.setattr(WholeCheckpoints, "save_checkpoint", deadly)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_a_fit_whose_newest_checkpoint_is_damaged_ends_as_an_unbroken_one(
    workspace: Workspace, folder: Path, how: str
) -> None:
    """Model, delta and every row of the log are the same, in the same places."""
    often = ["--model.save_minutes", "1e-6"]
    fit(workspace, folder / "whole", *often)
    for call in (1, 3, 4):
        path = folder / str(call)
        with pytest.MonkeyPatch.context() as patch:
            dying(patch, call, lambda file: damage_file(file, how))
            with pytest.raises((KeyboardInterrupt, SystemExit)):
                fit(workspace, path, *often)
        fit(workspace, path, *often, "--resume")
        names = ["model/model.safetensors", "delta.safetensors", "logs/version_0/metrics.csv"]
        assert [name for name in names if (path / name).read_bytes() != (folder / "whole" / name).read_bytes()] == []
        assert [found.name for found in (path / "logs").iterdir()] == ["version_0"]


@pytest.mark.slow
@pytest.mark.parametrize(("room", "place"), [(80_000, "model"), (20_000, "checkpoints"), (100, "")])
def test_a_fit_on_a_full_disk_says_where_and_can_be_resumed(
    workspace: Workspace, folder: Path, room: int, place: str
) -> None:
    """One sentence, no rest of what could not be written, and the same results once there is room."""
    small = ["--optimizer", "SGD", "--optimizer.lr", "0.1"]  # checkpoints are smaller than the model
    fit(workspace, folder / "whole", *small, epochs=1)
    path = folder / "full"
    with pytest.raises(UserError, match=rf"{path / place}\S* cannot be written \(File too large\)"), full_disk(room):
        fit(workspace, path, *small, epochs=1)
    assert not list(path.rglob("*.partial"))
    again = ["--resume"] if path.exists() else []
    fit(workspace, path, *small, *again, epochs=1)
    for name in ("model/model.safetensors", "delta.safetensors", "logs/version_0/metrics.csv"):
        assert (path / name).read_bytes() == (folder / "whole" / name).read_bytes()


def test_a_loss_that_is_not_finite_is_in_no_checkpoint(workspace: Workspace, folder: Path) -> None:
    """Its step is not due yet, but a run that went on from there would take it without looking at it again."""
    module = workspace.module(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=math.inf))
    run = trainer(folder, enable_checkpointing=False, accumulate_grad_batches=2, callbacks=[SaveOften(folder)])
    with pytest.raises(UserError, match="training loss became nan in epoch 0, at the examples"):
        run.fit(module, datamodule=workspace.data(batch_size=3))
    assert sorted(path.name for path in folder.glob("*.ckpt")) == ["0-0.ckpt", "0-1.ckpt"]
