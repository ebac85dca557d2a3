"""The guides for those who write plugins, run as they stand: files written, commands run, in a fresh environment.

The programs of Python, but for pip, run in processes that are forked from one with the libraries imported.
"""

import os
import re
import shlex
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

from dualsft import load_selection
from tests.world.embedded import ROOT, embed
from tests.world.programs import run_program

BLOCK = re.compile(r'^```(\w+)(?: title="(.+?)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)


def environment(folder: Path) -> Path:
    """A virtual environment that sees what is installed in this one, pip included; where its packages are."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    ours = sysconfig.get_path("purelib")
    (site / "ours.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
    return site


def follow(page: Path, folder: Path, every: int = 4) -> dict[str, str]:
    """Do what a page says, from its first block to its last.

    Args:
        page: Blocks with a title are files, to be written; those in bash are run.
        folder: A fresh folder, in which the page finds what it takes from the repository.
        every: How much of the validation set it finds, of which a quarter serves a page that says nothing of it.

    Returns:
        What the commands of each block printed, by the block's text.
    """
    for name in ("configs", "plugins"):
        (folder / name).symlink_to(ROOT / name)
    embed(folder, every)
    packages = environment(folder / "environment")
    printed = {}
    for language, title, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        if title:
            (folder / title).parent.mkdir(exist_ok=True)
            (folder / title).write_text(text, encoding="utf-8")
            continue
        assert language == "bash", f"{page.name} has a block of {language} that is neither a file nor a command"
        printed[text] = "".join(said(line, folder, packages) for line in text.splitlines())
    return printed


def said(line: str, folder: Path, packages: Path) -> str:
    """What a command prints, which must succeed."""
    words, variables = shlex.split(line), dict(os.environ)
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    if words[0] in ("dualsft", "python"):
        assert not set("|<>$*;&") & set(line), f"{line} needs a shell"
        done = run_program(words, folder, variables, packages)
    else:
        python = f"{packages.parents[2]}/bin/python -m "
        command = ["bash", "-euo", "pipefail", "-c", python + line if words[0] == "pip" else line]
        done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def class_of(selection: Path, part: str) -> dict[str, object]:
    """What a selection says that it was made with."""
    described: dict[str, object] = load_selection(selection).manifest[part]
    return described


@pytest.mark.heavy
def test_write_a_scorer(tmp_path: Path) -> None:
    """From an empty folder to a selection by a scorer of 20 lines, which differs from the built-in one's."""
    page = ROOT / "docs" / "write_a_scorer.md"
    printed = "".join(follow(page, tmp_path).values())
    assert len((tmp_path / "my-scorer" / "strongest.py").read_text().splitlines()) == 20
    assert re.search(r"strongest +strongest:Strongest +my-scorer 0.1.0 +First order, along the largest", printed)
    assert "Of each parameter's entries the part that counts" in " ".join(printed.split())
    assert "1 passed" in printed
    ours = class_of(tmp_path / "runs" / "strongest", "scorer")
    assert ours == {"class_path": "strongest.Strongest", "options": {"share": 0.01}}
    compared = re.search(r"(\d+) of 10 examples are the same", printed)
    assert compared
    assert int(compared[1]) < 10


@pytest.mark.heavy
def test_write_a_path(tmp_path: Path) -> None:
    """From an empty folder to a selection along checkpoints by a path of 20 lines, with the figures that it tells."""
    page = ROOT / "docs" / "write_a_path.md"
    printed = "".join(follow(page, tmp_path, every=1).values())
    assert len((tmp_path / "my-path" / "checkpoints.py").read_text().splitlines()) == 20
    assert re.search(r"checkpoints +checkpoints:Checkpoints +my-path 0.1.0 +From the base model through", printed)
    assert "Hugging Face folders or hub ids, in the order of the training." in " ".join(printed.split())
    assert "1 passed" in printed
    (shown,) = re.findall(r"^It prints:\n\n((?:    .*\n)+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert shown.replace("\n    ", "\n").strip() in printed
    along = load_selection(tmp_path / "runs" / "path").manifest["path"]["along"]
    folders = ["checkpoints/1", "checkpoints/2"]
    assert along == {"class_path": "checkpoints.Checkpoints", "options": {"folders": folders}}


@pytest.mark.heavy
def test_write_an_allocator(tmp_path: Path) -> None:
    """The template, copied, passes its tests, and what is put in place of its rules decides both sides."""
    printed = "".join(follow(ROOT / "docs" / "write_an_allocator.md", tmp_path).values())
    assert len(re.findall(r"my_dualsft_plugin:My\w+ +my-dualsft-plugin 0.1.0 +\w", printed)) == 4
    assert "4 passed" in printed
    assert "ranks by score per supervised token" in " ".join(printed.split())
    both = load_selection(tmp_path / "runs" / "both")
    assert both.manifest["data_allocator"]["options"] == {"exponent": 0.5}
    assert both.manifest["parameter_allocator"]["class_path"].endswith("weights.MyWeights")
    assert both.example_ids == load_selection(tmp_path / "runs" / "longer").example_ids
    rows = load_selection(tmp_path / "runs" / "mine").examples.to_pylist()
    density = {row["example_id"]: row["score"] / row["num_tokens"] for row in rows if row["score"] is not None}
    chosen = {row["example_id"] for row in rows if row["selected"]}
    assert min(density[i] for i in chosen) >= max(d for i, d in density.items() if i not in chosen)
