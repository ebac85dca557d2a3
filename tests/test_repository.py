"""What the repository promises to someone who has just cloned it."""

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dualsft import load_selection
from dualsft.cli import run
from tests.world.jobs import write_inputs

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """The README's shell commands, in order."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    return [line for block in blocks for line in block.strip().splitlines()]


def test_ci_runs_the_readme_test_command() -> None:
    """CI calls the very commands that the README gives for the tests, then the heavy ones, the linters and the site."""
    lines = [line.strip() for line in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()]
    given = [line for line in commands() if "pytest" in line]
    assert given
    after = lines[max(map(lines.index, given)) :]
    assert any(line.startswith("python -m pytest -n 3 -m heavy") for line in after)
    assert any(line.startswith("pre-commit run --all-files") for line in after)
    assert any("mkdocs build" in line and "--strict" in line for line in after)


def test_readme_names_files_that_exist() -> None:
    """Every configuration in the README's commands is there."""
    for path in re.findall(r"configs/[\w.-]+\.yaml", README):
        assert (ROOT / path).is_file(), path


def project() -> dict[str, Any]:
    """What the package says of itself."""
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


def test_each_dependency_has_its_reason() -> None:
    """Each declared dependency has its line in the table of the architecture page."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for requirement in project()["dependencies"]:
        name = re.split(r"[^\w-]", requirement)[0]
        assert f"\n| {name} | " in page, name


def test_release_is_the_same_everywhere() -> None:
    """Version and date are the same in pyproject.toml, in CITATION.cff and in the newest release of the changelog."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    releases = re.findall(r"^## \[(.+?)\](?: - (\S+))?$", changelog, re.MULTILINE)
    assert releases[0] == ("Unreleased", "")
    assert releases[1] == (citation["version"], citation["date-released"])
    assert citation["version"] == project()["version"]
    assert citation["license"] == project()["license"]


def test_citation_names_software_and_paper() -> None:
    """CITATION.cff has what its format asks for, and the paper of the method."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation.keys() >= {"cff-version", "message", "title", "authors", "type"}
    assert all(author.keys() <= {"name", "family-names", "given-names"} for author in citation["authors"])
    (paper,) = citation["references"]
    assert paper["identifiers"][0]["value"] == "arXiv:2605.06166"
    assert paper["url"] == project()["urls"]["Paper"]


def test_hosted_files_are_read() -> None:
    """The workflow runs what CI runs, issue forms have what a form must, and each is YAML."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert {"run": "bash .ci/run"} in steps
    assert all(("uses" in step) != ("run" in step) for step in steps)
    pythons = workflow["jobs"]["quick"]["strategy"]["matrix"]["python"]
    assert all(f"Programming Language :: Python :: {version}" in project()["classifiers"] for version in pythons)
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        if path.name != "config.yml":
            assert form.keys() >= {"name", "description", "body"}, path.name
            ids = [field["id"] for field in form["body"]]
            assert len(set(ids)) == len(ids), path.name


def test_container_is_built_from_what_is_there() -> None:
    """What the Dockerfile copies exists and .dockerignore lets it through; the container runs as an ordinary user."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    let_through = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    assert copied
    for name in copied:
        assert (ROOT / name).exists(), name
        assert f"!{name}" in let_through, name
    assert 'ENTRYPOINT ["dualsft"]' in lines
    assert [line for line in lines if line.startswith("USER ")][-1] != "USER root"


def test_scorer_of_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scorer of the reference page, as it stands there, is taken by its class path and decides the scores."""
    page = (ROOT / "docs" / "reference" / "scorers.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "page_scorer.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    inputs = write_inputs(tmp_path)
    sources = ["--data.train", inputs.train, "--data.validation", inputs.validation]
    settings = ["--model.preconditioner", "none", "--model.warmup.fraction", "0", "--data.max_length", "48"]
    scores = []
    for scorer in ("page_scorer.Agreement", "first_order"):
        named = ["--model.model_name_or_path", inputs.model, "--model.scorer", scorer]
        run(["select", *named, *sources, *settings, "--output_dir", str(tmp_path / scorer)])
        scores.append(load_selection(tmp_path / scorer).parameter_scores())
    for name, ours in scores[0].items():
        first = scores[1][name]
        assert torch.allclose(ours, first.clamp(min=0), rtol=1e-3, atol=1e-6 * float(first.abs().max())), name


def shorten(quickstart: Path) -> None:
    """Cut from an installed quick start what decides none of the comparisons that its test makes.

    Fewer rows are left of each part, fits end after fewer epochs of a few batches, losses are measured after the last
    of them alone, and answers, which are compared with nothing, are short.
    """
    settings = "  limit_train_batches: 2\n"  # at the end is the trainer's section
    config = quickstart / "config.yaml"
    text = config.read_text(encoding="utf-8") + settings
    for shipped, shorter in {"max_new_tokens: 32": "max_new_tokens: 8", "max_epochs: 8": "max_epochs: 4"}.items():
        assert shipped in text
        text = text.replace(shipped, shorter)
    config.write_text(text, encoding="utf-8")
    rows_left = {"records/pool": 8, "records/validation": 3, "data/test_general": 32, "records/test_target": 16}
    for name, every in rows_left.items():
        path = quickstart / "assets" / f"{name}.jsonl"
        rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(rows[::every]), encoding="utf-8")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no repository")
def test_no_pickle_is_kept() -> None:
    """Nor a wheel: what tests or builds leave behind is not committed."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert "README.md" in listed
    assert [name for name in listed if Path(name).suffix in (".ckpt", ".pt", ".pth", ".pkl", ".bin", ".whl")] == []


@pytest.mark.heavy
def test_quick_start_from_a_wheel(tmp_path: Path) -> None:
    """A wheel installed outside the repository runs the quick start, which shows the effect that it claims."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert "dualsft/quickstart/assets/data/NOTICE" in zipfile.ZipFile(wheel).namelist()
    subprocess.run([*pip, "install", "--no-deps", "--no-compile", "--target", tmp_path / "site", wheel], check=True)
    shorten(tmp_path / "site" / "dualsft" / "quickstart")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-m", "dualsft", "quickstart", "--output_dir", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert str(tmp_path / "site") in done.stdout, "the repository's own package ran, not the wheel's"
    page = (tmp_path / "out" / "report" / "report.html").read_text(encoding="utf-8")
    assert "Fits beside each other" in page
    assert "out/report/report.html" in done.stdout
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / "metrics.json").read_text())}
    base, full, control, first_order, dual = rows.values()
    print(json.dumps(list(rows.values())))
    assert f"{dual['forgetting']:+.2f}" in done.stdout
    assert done.stdout.count("    before  ") == done.stdout.count("    after   ") == 3
    chosen = {(row["examples"], row["weights"]) for row in (control, first_order, dual)}
    assert chosen == {(0.1, 0.1)}
    assert (full["examples"], full["weights"]) == (1.0, 1.0)
    assert (base["forgetting"], base["seconds"], base["clean"]) == (0.0, 0.0, None)
    assert dual["clean"] > 3 * control["clean"]
    assert dual["clean"] > first_order["clean"]
