import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from dualsft.errors import UserError
from dualsft.runs import folder as run_folder
from dualsft.runs import state_file
from dualsft.runs.folder import RunFolder, write_atomically
from dualsft.runs.folder_lock import FolderLock
from tests.world.faults import KilledError, kill_at

IDENTITY = {"model": "m", "seed": 0, "budget": None}


def names(folder: Path) -> list[str]:
    """Everything under the folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def unfinished(path: Path) -> RunFolder:
    """A run killed after its first phase."""
    run = RunFolder(path)
    run.claim(IDENTITY)
    run.save("first", {"w": torch.arange(3.0)}, {"cost": 1})
    return run


def finished(path: Path) -> Path:
    """A complete run."""
    run = unfinished(path)
    for name in ("config.yaml", "manifest.json"):
        (path / name).write_text("result")
    run.finish()
    return path


def test_looking_leaves_no_trace(tmp_path: Path) -> None:
    """Until it is claimed, the folder is not even made."""
    RunFolder(tmp_path / "a" / "b")
    assert names(tmp_path) == []


def test_phases_survive(tmp_path: Path) -> None:
    """A finished phase's tensors and notes come back; an unfinished one's do not."""
    unfinished(tmp_path / "run")
    run = RunFolder(tmp_path / "run", resume=True)
    run.claim(IDENTITY)
    tensors, notes = run.load("first") or ({}, {})
    assert torch.equal(tensors["w"], torch.arange(3.0))
    assert notes == {"cost": 1}
    assert run.load("second") is None


def test_tensors_of_every_kind_survive(tmp_path: Path) -> None:
    """Types, shapes, order and values, whatever their layout; an empty state, too."""
    run = unfinished(tmp_path / "run")
    plain = {
        "byte": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3, dtype=torch.float64),
        "half": torch.randn(3, 5).bfloat16(),
        "turned": torch.arange(6.0, dtype=torch.float64).view(2, 3).t(),
        "every second": torch.arange(10)[::2],
        "parameter": torch.nn.Parameter(torch.randn(4)),
    }
    for tensors in (plain, {}):
        run.save("second", tensors, {"é": [1, None]})
        found, notes = run.load("second") or ({}, {})
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], value) for name, value in tensors.items())
        assert all(found[name].dtype == value.dtype for name, value in tensors.items())
        assert notes == {"é": [1, None]}


def test_what_is_done_to_loaded_tensors_stays_in_memory(tmp_path: Path) -> None:
    """A tensor can be changed in place without changing what is kept, and the state outlives its file."""
    run = unfinished(tmp_path / "run")
    tensors, _ = run.load("first") or ({}, {})
    w = tensors["w"].add_(1)
    again, _ = run.load("first") or ({}, {})
    assert torch.equal(again["w"], torch.arange(3.0))
    run.save("first", {"w": torch.zeros(3)}, {})
    run.drop("first")
    assert torch.equal(w, torch.arange(3.0) + 1)
    assert torch.equal(tensors["w"], torch.arange(3.0))


def shown(state: tuple[Mapping[str, torch.Tensor], dict[str, Any]] | None) -> str:
    """A state's tensors and notes as text."""
    return "none" if state is None else str((dict(state[0]), state[1]))


@pytest.mark.parametrize("phase", ["first", "second"])
def test_a_phase_is_saved_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str) -> None:
    """A save that is broken off leaves nothing that could be taken for the phase, and an older state as it was."""
    run = unfinished(tmp_path / "run")
    before = shown(run.load(phase))

    def broken(tensors: Any, path: Path, *_: Any) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(state_file, "save_file", broken)
    with pytest.raises(KeyboardInterrupt):
        run.save(phase, {}, {})
    assert shown(run.load(phase)) == before


def test_a_full_disk_is_told_and_not_filled_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be written whole is removed, what was kept stays, and the way on is told."""
    run = unfinished(tmp_path / "run")

    def full(tensors: Any, path: Path, *_: Any) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(state_file, "save_file", full)
    with pytest.raises(UserError, match=r"cannot be kept in .*unfinished \(.*No space left.*\); see that it can"):
        run.save("first", {}, {})
    assert names(tmp_path / "run" / ".unfinished") == ["first.safetensors", "lock", "run.json"]
    assert run.load("first") is not None


LOCK = """
import sys
from filelock import FileLock, Timeout
lock = FileLock(sys.argv[1], timeout=0)
try:
    lock.acquire()
    print("held", flush=True)
except Timeout:
    print("refused", flush=True)
sys.stdin.read()
"""


@contextmanager
def another_process(path: Path) -> Iterator[str]:
    """One that tries to hold a run until the context is left; what it says of it."""
    command = [sys.executable, "-c", LOCK, str(path / ".unfinished" / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.communicate()


@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_a_run_that_another_process_is_at_work_on_is_refused(tmp_path: Path, how: str) -> None:
    """Two of them would write into each other's files; once the other has ended, however, the run goes on."""
    unfinished(tmp_path)
    before = names(tmp_path)
    with another_process(tmp_path) as says:
        assert says == "held"
        with pytest.raises(UserError, match="Another process is at work on the run in"):
            RunFolder(tmp_path, resume=how == "resume", overwrite=how == "overwrite").claim(IDENTITY)
        assert names(tmp_path) == before
    RunFolder(tmp_path, resume=how == "resume", overwrite=how == "overwrite").claim(IDENTITY)


@pytest.mark.parametrize("how", ["anew", "resume", "overwrite"])
def test_a_claimed_run_is_held(tmp_path: Path, how: str) -> None:
    """From the claim on, until it is finished or let go."""
    if how != "anew":
        unfinished(tmp_path)
    run = RunFolder(tmp_path, resume=how == "resume", overwrite=how == "overwrite")
    run.claim(IDENTITY)
    run.save("first", {}, {})
    with another_process(tmp_path) as says:
        assert says == "refused"
    run.release()
    with another_process(tmp_path) as says:
        assert says == "held"


FORK = """
import os, sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1], timeout=0)
lock.acquire()
if os.fork() == 0:
    print("held", flush=True)  # once the child has let go of its copy
    time.sleep(60)
sys.stdin.read()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_killed_process_lets_go_though_its_workers_live_on(tmp_path: Path) -> None:
    """As the data loader's do for a while: a run can be resumed at once."""
    unfinished(tmp_path)
    command = [sys.executable, "-c", FORK, str(tmp_path / ".unfinished" / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="Another process"):
            RunFolder(tmp_path, resume=True).claim(IDENTITY)
        process.kill()
        process.wait()
        RunFolder(tmp_path, resume=True).claim(IDENTITY)
        os.killpg(process.pid, signal.SIGKILL)


def test_a_run_that_failed_does_not_keep_its_own_process_out(tmp_path: Path) -> None:
    """A notebook may hold on to a run, by the traceback of its failure, and resumes it all the same."""
    failed = unfinished(tmp_path)
    run = RunFolder(tmp_path, resume=True)
    run.claim(IDENTITY)
    del failed
    with another_process(tmp_path) as says:
        assert says == "refused"


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Nobody is kept out there, and nobody who died keeps anybody out."""

    def no_locks(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", no_locks)
    unfinished(tmp_path).finish()
    assert names(tmp_path) == []
    unfinished(tmp_path)
    RunFolder(tmp_path, resume=True).claim(IDENTITY)


def test_a_lock_that_cannot_be_deleted_is_deleted_once_it_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Windows, where no open file is deleted."""
    run, unlink = unfinished(tmp_path), Path.unlink

    def only_unlocked(path: Path, missing_ok: bool = False) -> None:
        if path.name == "lock" and run._lock.is_taken:
            raise PermissionError(13, "in use")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", only_unlocked)
    run.finish()
    assert names(tmp_path) == []


def test_finish_leaves_the_results_alone(tmp_path: Path) -> None:
    """State and staging are gone, results stay."""
    run = unfinished(tmp_path / "run")
    (run.staging() / "half").write_text("x")
    (tmp_path / "run" / "result").write_text("x")
    run.finish()
    assert names(tmp_path / "run") == ["result"]


def test_staging_is_fresh(tmp_path: Path) -> None:
    """What a killed run staged is not mixed with what this one stages."""
    run = unfinished(tmp_path / "run")
    (run.staging() / "old").write_text("x")
    assert list(run.staging().iterdir()) == []


def test_resuming_with_other_settings_is_refused(tmp_path: Path) -> None:
    """The settings that differ are named, also those that only one side has; the state stays."""
    unfinished(tmp_path)
    before = names(tmp_path)
    with pytest.raises(UserError, match=r"other settings \(budget, new, seed\); resume it with its own"):
        RunFolder(tmp_path, resume=True).claim({**IDENTITY, "seed": 1, "budget": 2, "new": None} | {"new": 3})
    assert names(tmp_path) == before


def test_settings_are_compared_as_they_are_written(tmp_path: Path) -> None:
    """A tuple becomes a list in JSON, which is no difference."""
    RunFolder(tmp_path).claim({"betas": (0.9, 0.999)})
    RunFolder(tmp_path, resume=True).claim({"betas": (0.9, 0.999)})
    assert json.loads((tmp_path / ".unfinished" / "run.json").read_text()) == {"betas": [0.9, 0.999]}


def test_resume_without_a_run_starts_anew(tmp_path: Path) -> None:
    """Resuming in an empty folder is a start."""
    run = RunFolder(tmp_path / "run", resume=True)
    run.claim(IDENTITY)
    assert run.load("first") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "holds files and no unfinished run; choose another --output_dir or give --overwrite"),
        ({"resume": True}, "there is nothing to resume; choose another --output_dir or give --overwrite"),
    ],
)
def test_a_finished_folder_is_not_written_to(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    """Results are replaced only where that is asked for."""
    finished(tmp_path)
    with pytest.raises(UserError, match=message):
        RunFolder(tmp_path, **options).claim(IDENTITY)
    assert names(tmp_path) == ["config.yaml", "manifest.json"]


def test_an_unfinished_run_is_neither_dropped_nor_resumed_unasked(tmp_path: Path) -> None:
    """Both ways out are told."""
    unfinished(tmp_path)
    with pytest.raises(UserError, match="--resume to go on with it or --overwrite to drop it"):
        RunFolder(tmp_path)


@pytest.mark.parametrize("make", [finished, unfinished])
def test_overwrite_starts_from_nothing(tmp_path: Path, make: Any) -> None:
    """Results, state and everything beside them go, but not before the new run claims the folder."""
    make(tmp_path / "run")
    (tmp_path / "run" / "logs").mkdir()
    (tmp_path / "run" / "logs" / "metrics.csv").write_text("1")
    before = names(tmp_path)
    run = RunFolder(tmp_path / "run", overwrite=True)
    assert names(tmp_path) == before
    run.claim({"seed": 1})
    assert names(tmp_path / "run") == [".unfinished", ".unfinished/lock", ".unfinished/run.json"]
    assert run.load("first") is None


def test_overwrite_follows_a_link_to_a_folder(tmp_path: Path) -> None:
    """A link stays a link; what it points to is emptied, but links inside are only unlinked."""
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("x")
    real = finished(tmp_path / "real")
    (real / "logs").symlink_to(kept)
    (tmp_path / "link").symlink_to(real)
    RunFolder(tmp_path / "link", overwrite=True).claim(IDENTITY)
    assert names(real) == [".unfinished", ".unfinished/lock", ".unfinished/run.json"]
    assert (tmp_path / "link").is_symlink()
    assert (kept / "file").read_text() == "x"


@pytest.mark.parametrize(
    "files",
    [
        ["thesis.tex"],
        ["manifest.json", "index.html"],
        ["config.yaml"],
        ["metrics.json"],
        ["config.yaml", "metrics.json", "src"],
    ],
)
def test_overwrite_leaves_strangers_files_alone(tmp_path: Path, files: list[str]) -> None:
    """A folder that no run of ours wrote is refused, though one of its files may be named like one of ours."""
    for name in files:
        (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match="no run of ours wrote"):
        RunFolder(tmp_path, overwrite=True)
    assert names(tmp_path) == sorted(files)


def test_a_kill_while_overwriting_leaves_an_unfinished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half-deleted results never pass for a run of their own, and the state of the old run is never taken over."""
    path = unfinished(tmp_path / "run").path
    (path / "config.yaml").write_text("half")

    def killed(folder: Path, keep: Any) -> None:
        if folder == path:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "_empty", killed)
        with pytest.raises(KeyboardInterrupt):
            RunFolder(path, overwrite=True).claim(IDENTITY)
    with pytest.raises(UserError, match="holds an unfinished run"):
        RunFolder(path)
    run = RunFolder(path, resume=True)
    run.claim(IDENTITY)
    assert run.load("first") is None
    assert names(path) == [".unfinished", ".unfinished/lock", ".unfinished/run.json"]


def test_state_without_its_settings_is_dropped(tmp_path: Path) -> None:
    """A run killed as it finished may leave phases but not what they belong to: nobody takes them over."""
    unfinished(tmp_path)
    (tmp_path / ".unfinished" / "run.json").unlink()
    run = RunFolder(tmp_path, resume=True)
    run.claim({"seed": 1})
    assert run.load("first") is None


@pytest.mark.parametrize("killed_before", ["states are deleted", "the lock is deleted"])
def test_what_a_kill_in_the_end_leaves_goes_with_the_next_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_before: str
) -> None:
    """The next command on the folder deletes it, also one that is refused, unless another process is at work there."""
    run = unfinished(tmp_path)
    for name in ("config.yaml", "manifest.json"):
        (tmp_path / name).write_text("result")
    with monkeypatch.context() as patch:
        kill_at(patch, *((run_folder, "_empty") if killed_before == "states are deleted" else (FolderLock, "remove")))
        with pytest.raises(KilledError):
            run.finish()
    run._lock.release()  # as the system does when a process ends
    assert (tmp_path / ".unfinished").is_dir()
    with another_process(tmp_path) as says:
        assert says == "held"
        before = names(tmp_path)
        assert RunFolder(tmp_path, resume=True).complete
        assert names(tmp_path) == before
    with pytest.raises(UserError, match="already holds files and no unfinished run"):
        RunFolder(tmp_path)
    assert names(tmp_path) == ["config.yaml", "manifest.json"]


def test_contradiction_is_refused(tmp_path: Path) -> None:
    """Resume and overwrite exclude each other."""
    with pytest.raises(UserError, match="contradict"):
        RunFolder(tmp_path, resume=True, overwrite=True)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    """A file in the place of the folder, or of one of its parents, is an error that names it."""
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(UserError, match="is a file"):
        RunFolder(file)
    with pytest.raises(UserError, match="cannot be written"):
        RunFolder(file / "run").claim(IDENTITY)


@pytest.mark.parametrize("text", ["", "{", "null", "[1]", "[" * 100_000])
def test_a_damaged_description_of_the_run_is_named(tmp_path: Path, text: str) -> None:
    """Nobody can tell then whose states these are."""
    unfinished(tmp_path / "run")
    (tmp_path / "run" / ".unfinished" / "run.json").write_text(text)
    again = RunFolder(tmp_path / "run", resume=True)
    with pytest.raises(UserError, match=r"run\.json is damaged \(.*\); give --overwrite to start anew"):
        again.claim({"a": 1})


def test_write_atomically(tmp_path: Path) -> None:
    """The text replaces what was there, and nothing else is left."""
    for text in ("a", "é"):
        write_atomically(tmp_path / "f", text)
    assert (tmp_path / "f").read_text(encoding="utf-8") == "é"
    assert names(tmp_path) == ["f"]


@pytest.mark.parametrize("given", [".", "model", "warmup/model.safetensors"])
def test_overwrite_spares_what_the_run_reads(tmp_path: Path, given: str) -> None:
    """A run never replaces its own inputs, however they are spelt; inputs elsewhere do not matter."""
    path = finished(tmp_path / "run")
    with pytest.raises(UserError, match="which this run reads"):
        RunFolder(path, overwrite=True, inputs=[None, str(tmp_path / "run" / ".." / "run" / given)])
    RunFolder(path, overwrite=True, inputs=[None, str(tmp_path / "other"), "hub/name"])


def test_release_drops_a_claim_with_nothing_to_resume(tmp_path: Path) -> None:
    """After a mistake the folder is free again, unless a phase or a checkpoint is worth going on from."""
    run = RunFolder(tmp_path / "run")
    run.release()
    assert not run.path.exists()
    run.claim(IDENTITY)
    run.release()
    assert not run.path.exists()
    run.claim(IDENTITY)
    run.save("phase", {"x": torch.zeros(1)}, {})
    run.release()
    assert run.load("phase") is not None


def test_release_leaves_an_earlier_run_alone(tmp_path: Path) -> None:
    """A mistake that shows before the claim costs nothing of what the folder holds."""
    path = finished(tmp_path / "run")
    before = names(path)
    RunFolder(path, overwrite=True).release()
    assert names(path) == before


def test_a_folder_that_fills_between_look_and_claim_is_left_alone(tmp_path: Path) -> None:
    """Another process's finished or unfinished run has come in the meantime, of which this one knows nothing."""
    cases: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("new", {}, "already holds files"),
        ("resumed", {"resume": True}, "holds a finished run"),
        ("replaced", {"overwrite": True}, "has written to .* in the meantime; give --overwrite again"),
    )
    for name, options, message in cases:
        path = tmp_path / name
        if name == "replaced":
            finished(path)
        late = RunFolder(path, **options)
        before = names(finished(path) if name != "replaced" else overwritten(path))
        with pytest.raises(UserError, match=message):
            late.claim(IDENTITY)
        assert names(path) == before
    late = RunFolder(tmp_path / "dead")
    unfinished(tmp_path / "dead")._lock.release()
    with pytest.raises(UserError, match="holds an unfinished run; give --resume"):
        late.claim(IDENTITY)
    assert RunFolder(tmp_path / "dead", resume=True).load("first") is not None


def overwritten(path: Path) -> Path:
    """A complete run in the place of another."""
    run = RunFolder(path, overwrite=True)
    run.claim(IDENTITY)
    for name in ("config.yaml", "manifest.json"):
        (path / name).write_text("another")
    run.finish()
    return path


def test_a_claim_that_is_refused_leaves_no_folder(tmp_path: Path) -> None:
    """One that was made for the lock alone, as for a run that ended in the meantime."""
    late = RunFolder(tmp_path / "run", resume=True)
    finished(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "other").write_text("x")
    with pytest.raises(UserError, match="already holds files"):
        late.claim(IDENTITY)
    assert names(tmp_path / "run") == ["other"]


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("step", ["staging", "finish", "release"])
def test_a_removed_folder_is_told_and_left_to_whoever_made_it_anew(tmp_path: Path, step: str, again: bool) -> None:
    """Whether it is gone or another run has claimed it since: nothing of that run is touched."""
    path = tmp_path / "run"
    run = RunFolder(path)
    run.claim(IDENTITY)
    shutil.rmtree(path)
    if again:
        (path / ".unfinished").mkdir(parents=True)
        for name in ("lock", "run.json"):
            (path / ".unfinished" / name).write_text("another")
    before = names(tmp_path)
    with pytest.raises(UserError, match="was removed, or taken over, while this run was at work on it"):
        getattr(run, step)()
    assert names(tmp_path) == before


@pytest.mark.parametrize("text", ["", "{", "[1]", "true", '"x"', "\x00", "null"])
def test_a_damaged_description_can_be_dropped(tmp_path: Path, text: str) -> None:
    """It is refused by name, and replaced where that is asked for."""
    unfinished(tmp_path)
    (tmp_path / ".unfinished" / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"run\.json is damaged \(.*\); give --overwrite to start anew"):
        RunFolder(tmp_path, resume=True).claim(IDENTITY)
    RunFolder(tmp_path, overwrite=True).claim(IDENTITY)


@pytest.mark.parametrize("call", [1, 2])
def test_a_claim_that_cannot_be_written_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """No folder where there was none; results stay if nothing has been deleted for the claim yet."""
    old = finished(tmp_path / "old")
    for run in (RunFolder(tmp_path / "new"), RunFolder(old, overwrite=True)):
        with monkeypatch.context() as patch:
            kill_at(patch, run_folder, "write_atomically", call, error=OSError(errno.ENOSPC, "No space left"))
            with pytest.raises(UserError, match="cannot be written"):
                run.claim(IDENTITY)
            run.release()  # as its caller does after any failure
    assert names(tmp_path) == (["old", "old/config.yaml", "old/manifest.json"] if call == 1 else ["old"])
