"""Jobs on several ranks and nodes as they are started: from the command line, with torchrun, by SLURM; and killed."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from lightning import Callback

from dualsft import cli
from dualsft.errors import UserError
from dualsft.sharding.groups import rank
from tests.world.data import sums
from tests.world.jobs import write_inputs, write_job
from tests.world.ranks import free_port, run_on_ranks

pytestmark = pytest.mark.heavy

CONFIGS = Path(__file__).parent.parent.parent / "configs"
CHOSEN = ("mask.safetensors", "selected.jsonl")
PATIENCE = 300
"""Seconds in which a job has started and come to its first batches, on a busy machine too."""
STRATEGIES = ("fsdp2", "ddp")
SRUN = """#!/usr/bin/env bash
# what srun does, on one machine
while [[ $1 == --* ]]; do shift; done
for k in $(seq 0 $((SLURM_NTASKS - 1))); do
    SLURM_PROCID=$k SLURM_LOCALID=$((k % SLURM_NTASKS_PER_NODE)) SLURM_NODEID=$((k / SLURM_NTASKS_PER_NODE)) "$@" &
done
wait
"""


def job_of(folder: Path, examples: int) -> Path:
    """A configuration for a selection from so many short examples, and all that it names."""
    rows = sums(examples)
    plain = {"preconditioner": "none", "warmup": {"fraction": 0.0}}
    model = {**plain, "parameter_budget": 0.1, "data_budget": 0.1, "save_minutes": 0.001}
    data = {"max_length": 64, "batch_tokens": 400}
    return write_job(folder, write_inputs(folder, rows, rows[-20:]), model=model, data=data)


def on_two(strategy: str) -> list[str]:
    """The options of a job on two ranks."""
    return ["--trainer.strategy", strategy, "--trainer.devices", "2"]


def select(job: Path, output: Path) -> list[str]:
    """The arguments that make a selection."""
    return ["select", "--config", str(job), "--output_dir", str(output)]


@contextmanager
def started(command: list[str], stderr: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, of which nothing is left in the end."""
    own = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    with open(stderr, "wb") as told:
        process = subprocess.Popen(
            command, env={**own, **environment}, stderr=told, stdout=subprocess.DEVNULL, start_new_session=True
        )
        try:
            yield process
        finally:
            for pid in members(process.pid):
                os.kill(pid, signal.SIGKILL)
            process.wait()


def run(command: list[str], stderr: Path, **environment: str) -> None:
    """A process that is to succeed."""
    with started(command, stderr, **environment) as process:
        assert process.wait(PATIENCE) == 0, stderr.read_text()


def dualsft(arguments: list[str]) -> list[str]:
    """A command line."""
    return [sys.executable, "-m", "dualsft", *arguments]


def members(group: int) -> list[int]:
    """The living processes of a group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, rest = stat.read_text().split(" (", 1)
        except OSError:  # it has just ended
            continue
        state, _, its_group, *_ = rest.rpartition(") ")[2].split()
        if int(its_group) == group and state not in "ZX":
            found.append(int(pid))
    return found


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Return as soon as it holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"no {what} after {seconds} s"
        time.sleep(0.02)


def assert_same(folder: Path, expected: Path, names: Sequence[str]) -> None:
    """These files of two selections are the same to the byte."""
    for name in names:
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a job, and what one process selects."""
    folder = tmp_path_factory.mktemp("alone")
    cli.run(select(job_of(folder, 60), folder / "selection"))
    return folder


def test_two_nodes_started_with_torchrun_select_what_one_process_does(alone: Path, tmp_path: Path) -> None:
    """Two nodes on loopback, each with a copy of the model on two ranks: the same mask and subset to the byte."""
    script = [str(CONFIGS / "torchrun.sh"), *select(alone / "job.yaml", tmp_path / "nodes")]
    nodes = {"MAIN_HOST": "127.0.0.1", "MAIN_PORT": str(free_port()), "GPUS_PER_NODE": "2"}
    nodes["STRATEGY"] = "hsdp"
    with started(script, tmp_path / "1.log", **nodes, NODE_RANK="1") as other:
        run(script, tmp_path / "0.log", **nodes, NODE_RANK="0")
        assert other.wait(60) == 0, (tmp_path / "1.log").read_text()
    assert_same(tmp_path / "nodes", alone / "selection", CHOSEN)


def test_a_slurm_job_selects_what_one_process_does(alone: Path, tmp_path: Path) -> None:
    """The shipped batch script, with two tasks that `srun` would start on two nodes."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text(SRUN)
    (tmp_path / "bin" / "srun").chmod(0o755)
    slurm = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2", "SLURM_NODELIST": "127.0.0.1"}
    slurm |= {"SLURM_JOB_NAME": "dualsft", "SLURM_JOB_ID": "1", "MASTER_PORT": str(free_port())}
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    script = ["bash", str(CONFIGS / "slurm.sbatch"), *select(alone / "job.yaml", tmp_path / "tasks")]
    run(script, tmp_path / "tasks.log", **slurm, PATH=path)
    assert_same(tmp_path / "tasks", alone / "selection", CHOSEN)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a job that takes a while, and what two ranks select under each strategy unless they are killed."""
    folder = tmp_path_factory.mktemp("unbroken")
    job = job_of(folder, 1200)
    for strategy in STRATEGIES:
        run_on_ranks(2, cli.run, [*select(job, folder / strategy), *on_two(strategy)])
    return folder


def run_and_kill(command: list[str], output: Path, log: Path, started_rank: bool) -> None:
    """Kill one of two ranks in the scores pass: no rank lives on, and the other says why in a sentence."""

    def states() -> set[int]:
        """The times of the states of the pass that rank 1 has kept last; a replica replaces its file."""
        found = set()
        for path in output.glob(".unfinished/scores.under-way*.rank-1-of-2.safetensors"):
            with suppress(FileNotFoundError):  # it has just been replaced
                found.add(path.stat().st_mtime_ns)
        return found

    known = states()
    with started(command, log) as process:

        def another_state() -> bool:
            assert process.poll() is None, "the job is over too soon"
            return bool(states() - known)

        # the second state is kept once all shards have the first
        wait_for(another_state, PATIENCE, "state of the pass")
        known |= states()
        wait_for(another_state, PATIENCE, "second state of the pass")
        (other,) = set(members(process.pid)) - {process.pid}
        os.kill(other if started_rank else process.pid, signal.SIGKILL)
        wait_for(lambda: process.poll() is not None and not members(process.pid), 60, "end of all ranks")
    assert not (output / "manifest.json").exists()
    told = [line for line in log.read_text().splitlines() if line.startswith("dualsft: error")]
    if started_rank and process.returncode == -signal.SIGKILL:
        # Lightning, which looks every five seconds, has found the other dead too, perhaps before there was a word
        assert len(told) <= 1
    else:
        assert len(told) == 1
    assert all("another process of this job has stopped" in line for line in told)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_rank_that_is_killed_ends_the_job_which_then_goes_on(unbroken: Path, tmp_path: Path, strategy: str) -> None:
    """The started rank is killed, then, in the resumed job, the starting one; resumed once more, the job ends alike."""
    output = tmp_path / "selection"
    arguments = [*select(unbroken / "job.yaml", output), *on_two(strategy)]
    run_and_kill(dualsft(arguments), output, tmp_path / "1.log", started_rank=True)
    run_and_kill(dualsft([*arguments, "--resume"]), output, tmp_path / "2.log", started_rank=False)
    run_on_ranks(2, cli.run, [*arguments, "--resume"])
    scores = sorted(path.name for path in (unbroken / strategy).glob("parameter_scores*"))
    assert scores == sorted(path.name for path in output.glob("parameter_scores*"))
    assert_same(output, unbroken / strategy, (*CHOSEN, *scores, "examples.parquet"))


REASON = "the file of this rank is bad"


class Trouble(Callback):
    """Fails on some ranks at the second batch, or leaves a rank's number and sleeps."""

    def __init__(self, kind: str, ranks: list[int], folder: str = "") -> None:
        self._kind, self._ranks, self._folder = kind, ranks, folder

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx != 1:
            return
        if self._kind == "asleep":
            (Path(self._folder) / f"rank-{rank()}").write_text(str(os.getpid()))
            time.sleep(60 if rank() in self._ranks else 0)
        elif rank() in self._ranks:
            raise (RuntimeError if self._kind == "fault" else UserError)(REASON)


def troubled(alone: Path, output: Path, kind: str, ranks: Sequence[int], strategy: str = "fsdp2") -> list[str]:
    """A fit on two ranks that comes to grief."""
    options = {"kind": kind, "ranks": list(ranks), "folder": str(output.parent)}
    given = [part for k, v in options.items() for part in (f"--trainer.callbacks.{k}", str(v))]
    job = ["fit", "--config", str(alone / "job.yaml"), "--data.batch_size", "4", "--output_dir", str(output)]
    unsaved = ["--model.save_minutes", "60"]  # a checkpoint would keep the folder
    return dualsft([*job, *unsaved, *on_two(strategy), "--trainer.callbacks+", f"{__name__}.Trouble", *given])


@pytest.mark.parametrize(
    ("kind", "ranks", "told", "strategy"),
    [
        ("mistake", (0, 1), rf"^dualsft: error( \(rank 1\))?: {REASON}", "fsdp2"),
        ("fault", (1,), rf"^\[rank1\]: RuntimeError: {REASON}", "ddp"),
    ],
)
def test_a_failure_is_told_once_by_the_rank_that_failed(
    alone: Path, tmp_path: Path, kind: str, ranks: tuple[int, ...], told: str, strategy: str
) -> None:
    """Whether the others wait for it or fail alike, they add nothing, and all end; the folder is free."""
    with started(troubled(alone, tmp_path / "out", kind, ranks, strategy), tmp_path / "log") as process:
        assert process.wait(PATIENCE) not in (0, None)
        wait_for(lambda: not members(process.pid), 30, "end of all ranks")
    lines = (tmp_path / "log").read_text().splitlines()
    assert len([line for line in lines if re.search(told, line)]) == 1
    assert sum(REASON in line or "dualsft: error" in line for line in lines) == 1
    assert not (tmp_path / "out").exists()


def test_a_rank_that_waits_for_nobody_ends_with_the_one_that_started_it(alone: Path, tmp_path: Path) -> None:
    """It is in the middle of something else when rank zero is killed, and would be left over."""
    with started(troubled(alone, tmp_path / "out", "asleep", (1,)), tmp_path / "log") as process:
        wait_for(lambda: (tmp_path / "rank-1").exists() and (tmp_path / "rank-0").exists(), PATIENCE, "second batch")
        os.kill(process.pid, signal.SIGKILL)
        wait_for(lambda: not members(process.pid), 30, "end of the other rank")
