"""What the repository promises to someone who has just cloned it."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from dualsft import load_selection
from dualsft.cli import run
from tests.selection.runs import write_inputs

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """The README's shell commands, in order."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    return [line for block in blocks for line in block.strip().splitlines()]


def test_ci_runs_the_readme_test_command() -> None:
    """CI calls the very commands that the README gives for the tests, and the slow ones last."""
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    given = [line for line in commands() if "pytest" in line]
    assert given
    assert set(given) <= set(lines)
    assert lines[-1] == "python -m pytest -n 2 -m slow"


def test_readme_names_files_that_exist() -> None:
    """Every path in the README's tree and commands is there."""
    for path in re.findall(r"^    ((?:dualsft|benchmarks)\S*)", README, re.MULTILINE):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"configs/[\w.-]+\.yaml", README):
        assert (ROOT / path).is_file(), path


def test_readme_tells_why_each_dependency_is_there() -> None:
    """Each declared dependency has its line in the README's table."""
    declared = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    assert declared
    for name in re.findall(r'"([a-z_]+)', declared[1]):
        assert f"\n| {name} | " in README, name


def test_readme_scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's scorer, as it stands there, is taken by its class path and decides the scores."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "readme_scorer.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    inputs = write_inputs(tmp_path)
    sources = ["--data.train", inputs.train, "--data.validation", inputs.validation]
    settings = ["--model.preconditioner", "none", "--model.warmup.fraction", "0", "--data.max_length", "48"]
    scores = []
    for scorer in ("readme_scorer.Agreement", "first_order"):
        named = ["--model.model_name_or_path", inputs.model, "--model.scorer", scorer]
        run(["select", *named, *sources, *settings, "--output_dir", str(tmp_path / scorer)])
        scores.append(load_selection(tmp_path / scorer).parameter_scores())
    for name, ours in scores[0].items():
        first = scores[1][name]
        assert torch.allclose(ours, first.clamp(min=0), rtol=1e-3, atol=1e-6 * float(first.abs().max())), name


@pytest.mark.slow
def test_quick_start_from_a_wheel(tmp_path: Path) -> None:
    """A wheel installed outside the repository runs the quick start, which shows the effect that it claims."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert "dualsft/quickstart/assets/data/NOTICE" in zipfile.ZipFile(wheel).namelist()
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel], check=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-m", "dualsft", "quickstart", "--output_dir", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert str(tmp_path / "site") in done.stdout, "the repository's own package ran, not the wheel's"
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / "metrics.json").read_text())}
    base, full, control, dual = rows.values()
    assert f"{dual['target_loss']:.3f}" in done.stdout
    assert (dual["examples"], dual["weights"]) == (control["examples"], control["weights"]) == (0.1, 0.1)
    assert (full["examples"], full["weights"]) == (1.0, 1.0)
    assert dual["clean_target"] > 3 * control["clean_target"]
    assert dual["target_loss"] < control["target_loss"]
    assert dual["target_loss"] < base["target_loss"]
