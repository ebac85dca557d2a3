"""The run on a GPU: its sections as a miniature on the CPU, and what becomes of sections that do not end well."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from gpu_checks import SECTIONS
from gpu_checks.page import page
from gpu_checks.results import Outcome, Results, read_results
from gpu_checks.worker import Runner

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
WORKER = """
import json, sys, time
for name in sys.argv[1:]:
    print(json.dumps({"event": "begin", "section": name}), flush=True)
    print(json.dumps({"event": "figure", "section": name, "name": "a|b", "value": 0.5, "unit": "s"}), flush=True)
    if name == "hangs":
        time.sleep(60)
    if name == "dies":
        sys.exit(1)
    print(json.dumps({"event": "end", "section": name, "reason": "bad" if name == "fails" else ""}), flush=True)
"""
"""What a process of sections tells, without any library."""


def test_no_section_stops_another(tmp_path: Path) -> None:
    """One fails, one hangs, one dies with its process, and one comes when no time is left; the file tells all."""

    def command(names: Sequence[str]) -> list[str]:
        return [sys.executable, "-c", WORKER, *names]

    names = ["fails", "hangs", "dies", "works", "late"]
    results = Results(tmp_path / "found.json", {"device": "none"})
    results.sections = {name: Outcome(f"What {name}.") for name in names}
    limits = dict.fromkeys(names, 0.5)
    Runner(results, command, limits, 60.0).run(names[:-1])
    Runner(results, command, limits, 0.0).run(names[-1:])
    found = read_results(tmp_path / "found.json").sections
    assert {name: of.outcome for name, of in found.items()} == {
        "fails": "failed",
        "hangs": "stopped",
        "dies": "failed",
        "works": "done",
        "late": "skipped",
    }
    assert found["fails"].reason == "bad"
    assert all(of.figures == [{"name": "a|b", "value": 0.5, "unit": "s"}] for of in found.values() if of.seconds)
    text = page(read_results(tmp_path / "found.json"))
    assert "*Skipped: the budget of time was spent.*" in text
    assert text.count("| a/b") == 4


@pytest.mark.heavy
@pytest.mark.slow
def test_miniature(tmp_path: Path) -> None:
    """Without a GPU the sections run on the CPU, and say so; scores agree with autograd there. All can be loaded."""
    assert all(callable(section.load()) for section in SECTIONS.values())
    path = tmp_path / "gpu.json"
    names = ["correctness", "launches", "experts", "warm-up", "sums", "step parts", "phases", "choosing"]
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--output", str(path), "--sections", *names]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("No GPU: a miniature")
    found = json.loads(path.read_text(encoding="utf-8"))["sections"]
    errors = {figure["name"]: figure["value"] for figure in found["correctness"]["figures"]}
    assert len(errors) == 24
    assert all(error < (1e-12 if "64" in name else 1e-5 if "32" in name else 0.02) for name, error in errors.items())
    errors = {figure["name"]: figure["value"] for figure in found["experts"]["figures"][:6]}  # routers are in float32
    assert all(error < (1e-8 if "64" in name else 1e-5 if "32" in name else 0.1) for name, error in errors.items())
    assert all(found[name]["figures"] for name in names)
    assert found["warm-up"]["figures"][-1]["value"] < 0.01  # of the weights are rounded otherwise
    assert {f["name"]: f["value"] for f in found["sums"]["figures"]}["always, never: sums that differ"] == 0
