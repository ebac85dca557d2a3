"""Checkpoint files of a fit: written whole or not at all, checked before they are read, and the newest sound one.

They are Lightning's own, which ``torch.load`` reads. Such a file is a zip archive with a checksum (CRC-32) of each of
its parts, which torch writes but does not compare.
"""

import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.fabric.plugins import TorchCheckpointIO

from dualsft.errors import UserError, first_line
from dualsft.runs.progress import say
from dualsft.storage.writing import replacing, writing_to

_PARTS = ("state_dict", "loops", "callbacks", "optimizer_states", "lr_schedulers", "dualsft")
"""What a checkpoint to resume from holds, whoever wrote it."""


class WholeCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoints, written beside their place, synced to the disk, and moved there in one step.

    Lightning writes them to the temporary folder and copies them, so that a full disk or a kill leaves part of a file.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint; a `UserError` if it cannot be written."""
        if _is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        folder = Path(path).parent
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(Path(path)) as partial, open(partial, "wb") as stream:
                torch.save(checkpoint, stream)

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        """Read a checkpoint; a `UserError` if it is damaged."""
        if not _is_remote(path) and Path(path).is_file():
            refuse_damaged(Path(path))
        loaded: dict[str, Any] = super().load_checkpoint(path, *args, **options)
        return loaded


def write_whole_checkpoints(trainer: Trainer) -> None:
    """Have a trainer write its checkpoints by `WholeCheckpoints`, unless it has been given a writer of its own."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeCheckpoints()


def _is_remote(path: Any) -> bool:
    return "://" in str(path)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file, in a few words; None if torch reads it and all its bytes are as written."""
    try:
        with zipfile.ZipFile(path) as archive:
            if part := archive.testzip():
                return f"{part} in it has other bytes than were written"
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # damaged bytes may raise anything
        return first_line(error)[:100]
    return None


def refuse_damaged(path: Path) -> None:
    """Raise a `UserError` if a checkpoint file is damaged."""
    if reason := damage(path):
        raise UserError(f"{path} is damaged ({reason}); give another checkpoint, or start a new run.")


def checkpoint_files(folders: Iterable[Path]) -> list[Path]:
    """Lightning's checkpoints anywhere in some folders, the newest first."""
    found = {path for folder in folders for path in folder.rglob("*.ckpt") if path.is_file()}
    return sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def newest_whole(folders: Iterable[Path], needs_best: bool = False) -> Path | None:
    """The newest checkpoint that a run can resume from, None if there is none; it names those that it passes over.

    A damaged one is renamed, so that nothing takes it for a checkpoint. Parts of files that a kill left are deleted.

    Args:
        folders: The folders to look in.
        needs_best: Whether the best weights, to which checkpoints refer by the name of a file, must be sound too.
    """
    places = list(folders)
    for partial in {path for folder in places for path in folder.rglob("*.ckpt.partial")}:
        partial.unlink()
    for path in checkpoint_files(places):
        if reason := damage(path):
            path.replace(path.with_name(f"{path.name}.damaged"))
            say(f"{path} is damaged ({reason}) and is passed over; it is {path.name}.damaged now.")
        elif reason := _lack(path, needs_best):
            say(f"{path} is passed over: {reason}.")
        else:
            return path
    return None


def _lack(path: Path, needs_best: bool) -> str | None:
    """What a sound file lacks for a run to resume from it."""
    state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    if not isinstance(state, dict) or (missing := [part for part in _PARTS if part not in state]):
        return f"it holds no {missing[0]}" if isinstance(state, dict) else "it is no checkpoint of a fit"
    monitoring = [kept for kept in state["callbacks"].values() if isinstance(kept, dict) and kept.get("monitor")]
    for best in [Path(kept["best_model_path"]) for kept in monitoring if needs_best and kept.get("best_model_path")]:
        # in a folder that has since been moved, nothing is under the name that Lightning has kept
        if best.parent.is_dir() and damage(best):
            return f"the best weights that it refers to, {best}, are damaged or gone"
    return None
