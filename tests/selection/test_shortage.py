"""A real shortage of memory on the host, through the command line."""

import ctypes
import json
import os
import re
import resource
import subprocess
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from dualsft import load_selection
from dualsft.cli import run
from tests.world.data import sums
from tests.world.jobs import write_inputs, write_job
from tests.world.programs import run_program

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the address space cannot be measured"),
]

MEASURE = """
import json, pathlib, sys
from dualsft.cli import run

for command in sys.argv[1:]:
    run(json.loads(command))
    print(pathlib.Path("/proc/self/status").read_text(), file=sys.stderr)
"""
M_ARENA_MAX = -8


def confine(limit: int | None) -> None:
    """Limit this process's address space in bytes, which does not go by the number of its threads any more."""
    ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


@dataclass(frozen=True)
class Job:
    """A selection that is nearly all activations, so that what it takes goes by the size of a batch."""

    folder: Path

    def command(self, name: str, batch_tokens: int) -> list[str]:
        """What `dualsft` is told."""
        options = [f"--data.batch_tokens={batch_tokens}", f"--output_dir={self.folder / name}"]
        return ["select", "--config", str(self.folder / "job.yaml"), *options]

    def limited(self, name: str, batch_tokens: int, limit: int) -> subprocess.CompletedProcess[str]:
        """The command under a limit of its address space in bytes."""
        return self.started(["dualsft", *self.command(name, batch_tokens)], limit)

    def peaks(self, **batch_tokens: int) -> list[int]:
        """The largest address space in bytes after each of these commands, by one process without a limit."""
        commands = [json.dumps(self.command(name, tokens)) for name, tokens in batch_tokens.items()]
        (self.folder / "measure.py").write_text(MEASURE, encoding="utf-8")
        told = self.started(["python", "measure.py", *commands], None).stderr
        found = re.findall(r"VmPeak:\s+(\d+) kB", told)
        assert len(found) == len(commands), told
        return [1024 * int(peak) for peak in found]

    def started(self, program: list[str], limit: int | None) -> subprocess.CompletedProcess[str]:
        """What a program says and how it ends; all of them are forked from one process, and as large at their start."""
        return run_program(program, self.folder, os.environ, confine=partial(confine, limit))


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A tiny model with a wide layer, and a pool that fills a batch of 2,048 tokens."""
    folder = tmp_path_factory.mktemp("job")
    sizes = {"hidden_size": 8, "intermediate_size": 16_000, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.02}
    inputs = write_inputs(folder, sums(80), sums(2), **sizes, **heads)
    write_job(folder, inputs, model={"preconditioner": "none", "warmup": {"fraction": 0.0}})
    return Job(folder)


def test_a_real_shortage_halves_the_batches_or_stops_with_advice(job: Job) -> None:
    """Where half a batch fits, the scores are those of half batches; where it does not, the command says what to do."""
    quarter, whole = job.peaks(quarter=512, whole=2048)
    assert whole - quarter > 400 * 2**20  # what a batch takes stands out
    run(job.command("half", 1024))
    # a half batch takes a third of the way from a quarter to the whole
    enough = job.limited("enough", 2048, limit=quarter + (whole - quarter) * 2 // 3)
    assert enough.returncode == 0, enough.stderr
    assert re.fullmatch(
        r"dualsft: memory ran out in the scores \(at a request for \d+ MiB\); it starts again with batches of 1024 "
        r"tokens, not 2048\.",
        enough.stderr.strip().splitlines()[-1],
    )
    half, found = load_selection(job.folder / "half"), load_selection(job.folder / "enough")
    assert found.examples.equals(half.examples)
    assert found.manifest["scoring_batch_tokens"] == 1024
    short = job.limited("short", 2048, limit=quarter + (whole - quarter) // 8)
    assert short.returncode == 1
    assert "Traceback" not in short.stderr
    assert re.fullmatch(
        r"dualsft: error: Memory ran out in the scores \(at a request for \d+ MiB\) with batches of 1024 tokens, "
        r"halved already; set model\.gradient_checkpointing and .*\.",
        short.stderr.strip().splitlines()[-1],
    )
    assert sorted(path.name for path in (job.folder / "short").iterdir()) == [".unfinished"]
