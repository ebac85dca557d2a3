"""The output folder of a run: claimed before work starts, never overwritten unasked, and resumable after a kill.

While a run is under way its folder holds ``.unfinished/``: what the run is (``run.json``) and the state of its phases.
It is removed when the run is complete.
"""

import fcntl
import json
import os
import shutil
import weakref
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from torch import Tensor

from dualsft.errors import UserError
from dualsft.runs.phase_store import PhaseStore
from dualsft.sharding.collectives import barrier, is_rank_zero, on_rank_zero

_RUN, _MANIFEST, _FINISHED = "run.json", "manifest.json", ".finished"
_RESULTS = (_MANIFEST, "delta.safetensors", "metrics.json", "config.json", "adapter_config.json")
_WRITTEN = (
    *(
        ".unfinished",
        ".finished",
        "config.yaml",
        "manifest.json",
        "examples.parquet",
        "parameter_scores*",
        "mask.safetensors",
    ),
    *(
        "selected.jsonl",
        "token_scores.parquet",
        "example_sketches.safetensors",
        "warmup",
        "model",
        "model.*",
        "delta.safetensors*",
        "checkpoints",
        "logs",
        "metrics.json",
        "tasks.json",
    ),
    *("selection", "random-selection", "fit-*", "eval-*"),
)
"""Names, at the top of an output folder, of what the commands write there."""


class RunFolder:
    """One run's output folder.

    Args:
        folder: Where the results go.
        resume: Go on from what a killed run left there; starts anew where there is nothing.
        overwrite: Replace what is there.
        inputs: Paths that the run reads, None for those not given; a run never replaces them.
        resumable: Whether the command knows --resume.
        written: Names, at the top of the folder, of what this command writes there beside what all may write.

    Attributes:
        complete: Whether resuming has found a selection that is finished: whoever resumes after each kill may come once
            too often.

    Raises:
        UserError: if the folder holds anything and neither was asked for, or both were, or it holds an input.
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
        self.path = Path(folder)
        self._written = (*_WRITTEN, *written)
        self._resumable = resumable
        self._state = self.path / ".unfinished"
        self._phases = PhaseStore(self._state)
        self.complete = False
        if resume and overwrite:
            raise UserError("--resume and --overwrite contradict each other; give one of them.")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; give --output_dir a folder.")
        self._overwrite = overwrite
        if is_rank_zero():  # the other ranks may come when it is at work already
            self._look(resume, overwrite, inputs)
        self._claimed, self._made = False, not self.path.exists()
        self._let_go: weakref.finalize[[int], RunFolder] | None = None

    def _look(self, resume: bool, overwrite: bool, inputs: Sequence[str | None]) -> None:
        if self.path.is_dir() and any(self.path.iterdir()):
            self._check(resume, overwrite)
        if overwrite:
            self._check_inputs(inputs)

    def _check_inputs(self, inputs: Sequence[str | None]) -> None:
        here = self.path.resolve()
        for path in filter(None, inputs):
            if here in (place := Path(path).expanduser().resolve()).parents or here == place:
                raise UserError(f"--overwrite would delete {path}, which this run reads; choose another --output_dir.")

    def _check(self, resume: bool, overwrite: bool) -> None:
        if overwrite:
            foreign = [
                p.name for p in sorted(self.path.iterdir()) if not any(fnmatch(p.name, w) for w in self._written)
            ]
            if foreign or not self._is_ours():
                named = f" ({', '.join(foreign[:3])})" if foreign else ""
                raise UserError(
                    f"{self.path} holds files that no run of ours wrote{named}; they are left alone: choose another "
                    "--output_dir."
                )
        elif resume and not self._state.is_dir() and (self.path / _MANIFEST).is_file():
            self.complete = True
        elif not self._state.is_dir():
            advice = "there is nothing to resume; " if resume else ""
            raise UserError(
                f"{self.path} already holds files and no unfinished run; {advice}choose another --output_dir or give "
                "--overwrite."
            )
        elif not resume:
            advice = "--resume to go on with it or " if self._resumable else ""
            raise UserError(f"{self.path} holds an unfinished run; give {advice}--overwrite to drop it.")

    def _is_ours(self) -> bool:
        """Whether a run of ours wrote this folder: each leaves a configuration and one of a few results."""
        finished = (self.path / "config.yaml").is_file() and any((self.path / name).is_file() for name in _RESULTS)
        return finished or self._state.is_dir()

    def confirm(self, identity: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
        """See that the finished selection which resuming has found is the one that was asked for.

        Args:
            identity: What decides the outcome of the run that was asked for.
            manifest: That of the selection.

        Raises:
            UserError: if it is another one, naming what differs.
        """
        self._compare({key: manifest.get(key) for key in identity}, json.loads(json.dumps(identity)))
        shutil.rmtree(self.path / _FINISHED, ignore_errors=True)  # a kill in the last moment leaves it

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Start writing: say what this run is, so that nothing else is taken for its continuation.

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
        path = self._state / _RUN
        try:
            before = path.read_text(encoding="utf-8") if path.is_file() else None
            if before is not None:
                self._hold(path)
            if before is not None and not self._overwrite:
                self._compare(json.loads(before), json.loads(json.dumps(identity)))
                return
            self._clear()
            write_atomically(path, json.dumps(identity, indent=2))
            self._claimed = True
            self._hold(path)
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written ({error.strerror}); choose another --output_dir."
            ) from error

    def _hold(self, path: Path) -> None:
        """Keep other processes out; the system lets go of the lock when this one ends, however it ends.

        The lock is on the file that says what the run is. It would be lost if that were opened and closed again.
        """
        self._leave()
        held = os.open(path, os.O_RDWR)
        self._let_go = weakref.finalize(self, os.close, held)
        try:
            fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise UserError(
                f"Another process is at work on the run in {self.path}; let it finish, or choose another --output_dir."
            ) from error
        except OSError:  # a file system without locks
            pass

    def _leave(self) -> None:
        if self._let_go is not None:
            self._let_go()

    def release(self) -> None:
        """After a mistake: drop a claim that has nothing worth resuming, so that the next try finds the folder free."""
        self._leave()
        resumable = [*self._state.glob("*.safetensors"), *self.path.rglob("*.ckpt")]
        if self._claimed and not resumable:
            _empty(self.path)
            if self._made:
                self.path.rmdir()

    def _compare(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        if differing := sorted(key for key in {*before, *now} if before.get(key) != now.get(key)):
            raise UserError(
                f"{self.path} holds {'a finished' if self.complete else 'an unfinished'} run with other settings "
                f"({', '.join(differing)}); resume it with its own settings, or give --overwrite."
            )

    def _clear(self) -> None:
        """Empty the folder; from the first deletion on it counts as an unfinished run, whatever happens."""
        self._state.mkdir(parents=True, exist_ok=True)
        (self._state / _RUN).unlink(missing_ok=True)
        _empty(self._state)
        _empty(self.path, keep=self._state)

    def save(self, phase: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Keep a phase's state; see `PhaseStore.save`."""
        self._phases.save(phase, tensors, notes)

    def load(self, phase: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was kept of a phase; see `PhaseStore.load`."""
        return self._phases.load(phase)

    def drop(self, phase: str) -> None:
        """Forget a phase's state, if there is any."""
        self._phases.drop(phase)

    def staging(self) -> Path:
        """A fresh folder to write results into before they are published."""
        return self.scratch("staging")

    def scratch(self, name: str) -> Path:
        """A fresh folder, which goes when the run is finished."""

        def make() -> Path:
            folder = self._state / name
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            return folder

        return on_rank_zero(make)

    def finish(self) -> None:
        """Declare the run complete, in one step, and drop its state."""
        barrier()  # no rank reads it any more
        on_rank_zero(self._finish)

    def _finish(self) -> None:
        done = self.path / _FINISHED
        shutil.rmtree(done, ignore_errors=True)
        self._state.replace(done)
        self._leave()
        shutil.rmtree(done, ignore_errors=True)  # a network drive keeps files for as long as they are in memory


def _empty(folder: Path, keep: Path | None = None) -> None:
    for child in folder.iterdir():
        if child == keep:
            continue
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def publish(staged: Path, folder: Path, last: str) -> None:
    """Move staged results into their folder, the one last without which nothing there counts as a result."""
    for path in sorted(staged.iterdir(), key=lambda p: (p.name == last, p.name)):
        if path.is_file():
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())
        path.replace(folder / path.name)


def write_atomically(path: Path, text: str) -> None:
    """Write a small text file, whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
