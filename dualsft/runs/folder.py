"""The output folder of a run: claimed before work starts, never overwritten unasked, and resumable after a kill.

While a run is under way its folder contains ``.unfinished/``: a description of the run (``run.json``), a lock, and the
state of its phases. It is removed when the run is complete.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dualsft.errors import UserError
from dualsft.paths import check_writable, expanded
from dualsft.runs.phase_store import PhaseStore
from dualsft.sharding.collectives import barrier, is_rank_zero, on_rank_zero
from dualsft.writing import sync_folder, sync_to_disk, write_atomically, writing_to

UNFINISHED = ".unfinished"
_FINISHED, _RUN, _LOCK, _MANIFEST = ".finished", "run.json", "lock", "manifest.json"
_RESULTS = (_MANIFEST, "delta.safetensors", "metrics.json", "config.json", "adapter_config.json")
_WRITTEN = """
    .unfinished .finished config.yaml manifest.json examples.parquet parameter_scores* mask.safetensors selected.jsonl
    token_scores.parquet example_sketches.safetensors warmup model model.* delta.safetensors* checkpoints logs
    metrics.json tasks.json selection random-selection fit-* eval-*
"""
"""Patterns of the names that the commands write at the top of an output folder."""


class RunFolder(PhaseStore):
    """One run's output folder, with the states of its phases.

    Args:
        folder: The folder for the results.
        resume: Resume the run that a kill left there; starts from the beginning if there is none.
        overwrite: Replace the results there.
        inputs: Paths that the run reads, None for those not given; a run never replaces them.
        resumable: Whether the command knows --resume.
        written: Patterns of names that this command writes at the top of the folder, beside those of all commands.

    Attributes:
        complete: Whether the folder to resume holds a finished selection, as when a user resumes once too often.

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
        resumable: bool = True,
        written: Sequence[str] = (),
    ) -> None:
        self.path = Path(expanded(os.fspath(folder)))
        self._state = self.path / UNFINISHED
        super().__init__(self._state)
        self._written, self._resumable, self._overwrite = (*_WRITTEN.split(), *written), resumable, overwrite
        # one lock of each process, however many runs it opens on the folder
        self._lock = FileLock(
            self._state / _LOCK, timeout=0, thread_local=False, is_singleton=True, fallback_to_soft=False
        )
        self.complete = self._claimed = False
        self._is_new = not os.path.exists(self.path)
        if resume and overwrite:
            raise UserError("--resume and --overwrite contradict each other; give one of them.")
        if os.path.exists(self.path) and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; give --output_dir a folder.")
        if is_rank_zero():  # another rank might look after rank zero has written something
            self._check(resume, inputs)
            if not self.complete:
                check_writable(self.path)

    def _check(self, resume: bool, inputs: Sequence[str | None]) -> None:
        names = [path.name for path in sorted(self.path.iterdir())] if os.path.isdir(self.path) else []
        if self._overwrite:
            if names:
                self._check_ours(names)
            self._check_inputs(inputs)
        elif UNFINISHED in names and not resume:
            advice = "--resume to go on with it or " if self._resumable else ""
            raise UserError(f"{self.path} holds an unfinished run; give {advice}--overwrite to drop it.")
        elif names and UNFINISHED not in names:
            self.complete = resume and (self.path / _MANIFEST).is_file()
            if not self.complete:
                advice = "there is nothing to resume; " if resume else ""
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
        here = self.path.resolve()
        for path in filter(None, inputs):
            if here in (place := Path(expanded(path)).resolve()).parents or here == place:
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
        if self.complete:
            raise UserError(
                f"{self.path} holds a finished selection, there is nothing to resume; choose another --output_dir or "
                "give --overwrite."
            )
        run = self._state / _RUN
        try:
            self._state.mkdir(parents=True, exist_ok=True)
            self._acquire_lock()
            if run.is_file() and not self._overwrite:
                self._compare(_stored_identity(run), json.loads(json.dumps(identity)))
                return
            # from the first deletion on, the folder counts as an unfinished run, whatever happens
            run.unlink(missing_ok=True)
            _empty(self._state, keep=_LOCK)
            _empty(self.path, keep=UNFINISHED)
            self._claimed = True
            try:
                write_atomically(run, json.dumps(identity, indent=2))
            except UserError:
                self.release()
                raise
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written ({error.strerror}); choose another --output_dir."
            ) from error

    def _acquire_lock(self) -> None:
        """Keep other processes out; the system releases the lock when this process ends, however it ends."""
        self._lock.release(force=True)  # an earlier run of this process may have failed and left it
        (self._state / _LOCK).touch()
        try:
            self._lock.acquire()
        except Timeout as error:
            raise UserError(
                f"Another process is at work on the run in {self.path}; let it finish, or choose another --output_dir."
            ) from error
        except OSError:  # a file system without locks
            pass

    def release(self) -> None:
        """Undo a claim after a failure that left nothing worth resuming, so that the next try finds the folder free."""
        self._lock.release(force=True)
        resumable = [*self._state.glob("*.safetensors"), *self.path.rglob("*.ckpt")]
        if self._claimed and not resumable:
            _empty(self.path)
            if self._is_new:
                self.path.rmdir()

    def _compare(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        if differing := sorted(key for key in {*before, *now} if before.get(key) != now.get(key)):
            raise UserError(
                f"{self.path} holds {'a finished' if self.complete else 'an unfinished'} run with other settings "
                f"({', '.join(differing)}); resume it with its own settings, or give --overwrite."
            )

    def staging(self, name: str = "staging") -> Path:
        """A fresh folder to write results into before they are published; removed when the run is finished."""

        def make() -> Path:
            folder = self._state / name
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            return folder

        return on_rank_zero(make)

    def finish(self) -> None:
        """Declare the run complete, in one step, and delete its state."""
        barrier()  # no rank reads the state any more
        on_rank_zero(self._finish)

    def _finish(self) -> None:
        done = self.path / _FINISHED
        shutil.rmtree(done, ignore_errors=True)
        try:
            self._state.replace(done)  # the one step: a folder without `.unfinished` holds a finished run
        except PermissionError:  # Windows renames no folder with an open file in it
            self._lock.release(force=True)
            self._state.replace(done)
        self._lock.release(force=True)
        shutil.rmtree(done, ignore_errors=True)  # a network drive keeps files for as long as they are in memory


def _stored_identity(path: Path) -> dict[str, Any]:
    """The description of the unfinished run in a folder; refuses one that is damaged."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); give --overwrite to start anew.") from error
    if not isinstance(stored, dict):
        raise UserError(f"{path} is damaged (it is no JSON object); give --overwrite to start anew.")
    return stored


def _empty(folder: Path, keep: str = "") -> None:
    for child in folder.iterdir():
        if child.name == keep:
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
