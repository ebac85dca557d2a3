"""The output folder of a run: claimed before work starts, never overwritten unasked, and resumable after a kill.

While a run is under way its folder contains ``.unfinished/``: a description of the run (``run.json``), a lock, and the
state of its phases. It is removed when the run is complete. A folder holds an unfinished run as long as there is a
``run.json``, which is there before anything is deleted for the run. What a run sees when it first looks at the folder
may have changed when it claims it, so that it looks again once it has the lock.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from dualsft.errors import UserError
from dualsft.runs.folder_lock import FolderLock
from dualsft.runs.phase_store import PhaseStore
from dualsft.sharding.collectives import barrier, is_rank_zero, on_rank_zero
from dualsft.storage.paths import check_writable, expanded, real
from dualsft.storage.writing import sync_folder, sync_to_disk, write_atomically, writing_to

UNFINISHED = ".unfinished"
_FINISHED, _RUN, _LOCK, _MANIFEST = ".finished", "run.json", "lock", "manifest.json"
_BEING_EMPTIED = {"command": None}
"""In the place of a run's identity while the folder still holds some of what is deleted for it."""
_RESULTS = (_MANIFEST, "delta.safetensors", "metrics.json", "config.json", "adapter_config.json")
_WRITTEN = """
    .unfinished .finished config.yaml manifest.json examples.parquet parameter_scores* mask.safetensors selected.jsonl
    diagnostics.json parameters.parquet token_scores.parquet example_sketches.safetensors warmup model model.*
    delta.safetensors* checkpoints logs
    metrics.json tasks.json predictions.jsonl selection random-selection fit-* eval-*
"""
"""Patterns of the names that the commands write at the top of an output folder."""


class RunFolder(PhaseStore):
    """One run's output folder, with the states of its phases.

    Args:
        folder: The folder for the results.
        resume: Resume the run that a kill left there; starts from the beginning if there is none.
        overwrite: Replace the results there.
        inputs: Paths that the run reads, None for those not given; a run never replaces them.
        result: Name of the file whose presence, without an unfinished run, means that a finished one is resumed.
        resumable: Whether the command knows --resume.
        written: Patterns of names that this command writes at the top of the folder, beside those of all commands.

    Attributes:
        complete: Whether the folder to resume holds a finished run, as when a job is queued once too often.

    Raises:
        UserError: if the folder holds anything and neither was asked for, or both were, or it holds an input or cannot
            be written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        resume: bool = False,
        overwrite: bool = False,
        inputs: Sequence[str | None] = (),
        result: str = _MANIFEST,
        resumable: bool = True,
        written: Sequence[str] = (),
    ) -> None:
        self.path = Path(expanded(os.fspath(folder)))
        self._state = self.path / UNFINISHED
        super().__init__(self._state)
        self._written, self._result, self._inputs = (*_WRITTEN.split(), *written), result, inputs
        self._resume, self._resumable, self._overwrite = resume, resumable, overwrite
        self._lock = FolderLock(self._state / _LOCK)
        self.complete = self._claimed = False
        self._is_new = not os.path.exists(self.path)
        if resume and overwrite:
            raise UserError("--resume and --overwrite contradict each other; give one of them.")
        if os.path.exists(self.path) and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; give --output_dir a folder.")
        if is_rank_zero():  # another rank might look after rank zero has written something
            self._sweep()
            self._seen = self._marks()
            self._check()
            if not self.complete:
                check_writable(self.path)

    def _sweep(self) -> None:
        """Delete what a kill in the very end left of a finished run's state, unless another process is at work there.

        With --overwrite all of it goes later.
        """
        finished = self._state.is_dir() and (self.path / self._result).is_file()
        if self._overwrite or not finished or (self._state / _RUN).exists():
            return
        with suppress(OSError):  # a folder that can only be read keeps it
            if self._lock.acquire():
                if not (self._state / _RUN).exists():
                    _empty(self._state, keep=(_LOCK,))
                self._let_go()

    def _check(self) -> None:
        names = _names(self.path)
        unfinished = (self._state / _RUN).exists()
        if self._overwrite:
            if names:
                self._check_ours(names)
            self._check_inputs(self._inputs)
        elif unfinished and not self._resume:
            advice = "--resume to go on with it or " if self._resumable else ""
            raise UserError(f"{self.path} holds an unfinished run; give {advice}--overwrite to drop it.")
        elif not unfinished and set(names) - {UNFINISHED}:
            self.complete = self._resume and (self.path / self._result).is_file()
            if not self.complete:
                advice = "there is nothing to resume; " if self._resume else ""
                raise UserError(
                    f"{self.path} already holds files and no unfinished run; {advice}choose another --output_dir or "
                    "give --overwrite."
                )

    def _check_ours(self, names: Sequence[str]) -> None:
        """Refuse to overwrite a folder that no run wrote; every run leaves a configuration and one of a few results."""
        foreign = [name for name in names if not any(fnmatch(name, pattern) for pattern in self._written)]
        finished = (self.path / "config.yaml").is_file() and any((self.path / name).is_file() for name in _RESULTS)
        if foreign or not (finished or self._state.is_dir()):
            named = f" ({', '.join(foreign[:3])})" if foreign else ""
            raise UserError(
                f"{self.path} holds files that no run of ours wrote{named}; they are left alone: choose another "
                "--output_dir."
            )

    def _check_inputs(self, inputs: Sequence[str | None]) -> None:
        here = real(self.path)
        for path in filter(None, inputs):
            if here in (place := real(Path(expanded(path)))).parents or here == place:
                raise UserError(f"--overwrite would delete {path}, which this run reads; choose another --output_dir.")

    def confirm(self, identity: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
        """Check by its manifest that the finished selection in the folder has the run's identity."""
        self._compare({key: manifest.get(key) for key in identity}, json.loads(json.dumps(identity)))
        shutil.rmtree(self.path / _FINISHED, ignore_errors=True)  # left by a kill at the very end

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Lock the folder and record the run's identity, so that only the same run resumes from it.

        Called once the input has been checked, so that a mistake leaves no trace in the folder.

        Raises:
            UserError: if the folder's unfinished run is another one, naming what differs, another process is at work
                on it, or it cannot be written.
        """
        on_rank_zero(lambda: self._claim(identity))

    def _claim(self, identity: Mapping[str, Any]) -> None:
        try:
            if not self._lock.acquire():
                raise UserError(
                    f"Another process is at work on the run in {self.path}; let it finish, or choose another "
                    "--output_dir."
                )
            try:
                self._check_again()
                if not self._resumes(identity):
                    self._begin(identity)
                self.drop_partial()
            except BaseException:
                self._let_go()
                raise
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written ({error.strerror}); choose another --output_dir."
            ) from error

    def _check_again(self) -> None:
        """Check what other processes may have put into the folder until now, when they are locked out."""
        self._check()
        if self.complete:
            raise UserError(
                f"{self.path} holds a finished run, there is nothing to resume; choose another --output_dir or give "
                "--overwrite."
            )
        marks = self._marks()
        if self._overwrite and marks and marks != self._seen:
            raise UserError(
                f"Another process has written to {self.path} in the meantime; give --overwrite again if what it holds "
                "now is to be replaced, too."
            )

    def _marks(self) -> dict[str, tuple[int, int]]:
        """The files that say which run the folder holds, each with what changes when it is written."""
        marks = {}
        for path in [self.path / name for name in ("config.yaml", *_RESULTS)] + [self._state / _RUN]:
            with suppress(FileNotFoundError, NotADirectoryError):  # another process may delete it at any moment
                about = path.stat()
                marks[path.name] = about.st_ino, about.st_mtime_ns
        return marks

    def _resumes(self, identity: Mapping[str, Any]) -> bool:
        """Whether the folder's unfinished run is to go on; refuses one of another identity."""
        run = self._state / _RUN
        if self._overwrite or not run.exists():
            return False
        before = _stored_identity(run)
        if before == _BEING_EMPTIED:
            return False
        before.pop("shards", None)  # an earlier version's, which resumed on as many alone
        self._compare(before, json.loads(json.dumps(identity)))
        return True

    def _begin(self, identity: Mapping[str, Any]) -> None:
        """Start from nothing; from the first deletion on, the folder counts as an unfinished run."""
        run = self._state / _RUN
        write_atomically(run, json.dumps(_BEING_EMPTIED))
        _empty(self._state, keep=(_LOCK, _RUN))
        _empty(self.path, keep=(UNFINISHED,))
        self._claimed = True
        try:
            write_atomically(run, json.dumps(identity, indent=2))
        except (OSError, UserError):
            self.release()
            raise

    def _let_go(self) -> None:
        """Give the lock back, and leave nothing of it in a folder without an unfinished run."""
        if not self._lock.is_taken:
            return
        if (self._state / _RUN).exists():
            self._lock.release()
            return
        self._lock.remove()
        if self._is_new:
            with suppress(OSError):  # another process may have claimed it
                self.path.rmdir()

    def release(self) -> None:
        """Undo a claim after a failure that left nothing worth resuming, so that the next try finds the folder free.

        Raises:
            UserError: if the claimed folder has been removed, which is what the failure is about.
        """
        if self._lock.is_taken:
            self.check_held()
        if not self._claimed or any(self._state.glob("*.safetensors")) or any(self.path.rglob("*.ckpt")):
            self._lock.release()
            return
        _empty(self.path, keep=(UNFINISHED,))
        self._drop_state()
        self._let_go()
        self._claimed = False  # whoever handles the failure may release it again

    def _drop_state(self) -> None:
        """Delete all but the lock; what comes first decides whether the folder holds an unfinished run."""
        (self._state / _RUN).unlink(missing_ok=True)
        with suppress(OSError):  # a network drive keeps files for as long as they are in memory
            _empty(self._state, keep=(_LOCK,))

    def check_held(self) -> None:
        """Check, on rank zero, that the claimed folder has been left to this run.

        Raises:
            UserError: if it has been removed, even if another run has claimed it since.
        """
        if is_rank_zero() and not self._lock.is_held():
            raise UserError(
                f"{self.path} was removed, or taken over, while this run was at work on it; run it again and leave the "
                "folder alone until it is finished."
            )

    def _compare(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        if differing := sorted(key for key in {*before, *now} if before.get(key) != now.get(key)):
            raise UserError(
                f"{self.path} holds {'a finished' if self.complete else 'an unfinished'} run with other settings "
                f"({', '.join(differing)}); resume it with its own settings, or give --overwrite."
            )

    def staging(self, name: str = "staging") -> Path:
        """A fresh folder to write results into before they are published; removed when the run is finished."""

        def make() -> Path:
            self.check_held()
            folder = self._state / name
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            return folder

        return on_rank_zero(make)

    def state_folder(self, name: str) -> Path:
        """The place of a folder that `staging` has made, in this run or before it was killed."""
        return self._state / name

    def finish(self) -> None:
        """Declare the run complete, in one step, and delete its state."""
        barrier()  # no rank reads the state any more
        on_rank_zero(self._finish)

    def _finish(self) -> None:
        self.check_held()
        self._drop_state()
        self._let_go()


def _stored_identity(path: Path) -> dict[str, Any]:
    """The description of the unfinished run in a folder; refuses one that is damaged."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); give --overwrite to start anew.") from error
    if not isinstance(stored, dict):
        raise UserError(f"{path} is damaged (it is no JSON object); give --overwrite to start anew.")
    return stored


def _names(folder: Path) -> list[str]:
    """The names in a folder, none if there is no folder, which another process may have removed."""
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _empty(folder: Path, keep: Sequence[str]) -> None:
    for child in folder.iterdir():
        if child.name in keep:
            continue
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def publish(staged: Path, folder: Path, last: str) -> None:
    """Move staged results into their folder; the file ``last``, which marks them as complete, goes last."""
    with writing_to(folder):
        for path in sorted(staged.iterdir(), key=lambda p: (p.name == last, p.name)):
            if path.is_file():
                sync_to_disk(path)
            if path.name == last:
                sync_folder(folder)  # the names of the others are there before it is
            path.replace(folder / path.name)
        sync_folder(folder)
