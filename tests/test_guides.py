"""The guides for those who write plugins, run as they stand: files written, commands run, in a fresh environment."""

import os
import re
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

from dualsft import load_selection

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r'^```(\w+)(?: title="(.+?)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)


def environment(folder: Path) -> Path:
    """A virtual environment that sees what is installed in this one, pip included; its programs' folder."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    ours = sysconfig.get_path("purelib")
    (site / "ours.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
    for name, module in (("dualsft", "dualsft.cli"), ("pip", "pip._internal.cli.main")):
        program = folder / "bin" / name
        program.write_text(f"#!{folder}/bin/python\nfrom {module} import main\n\nraise SystemExit(main())\n")
        program.chmod(0o755)
    return folder / "bin"


def embedded(assets: Path, every: int) -> None:
    """The embedded model and pool, and every so many rows one of the validation set."""
    ours, validation = ROOT / "dualsft" / "quickstart" / "assets", "data/validation.jsonl"
    (assets / "data").mkdir(parents=True)
    for name in ("model", "data/pool.jsonl"):
        (assets / name).symlink_to(ours / name)
    rows = (ours / validation).read_text(encoding="utf-8").splitlines(keepends=True)
    (assets / validation).write_text("".join(rows[::every]), encoding="utf-8")


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
    embedded(folder / "dualsft" / "quickstart" / "assets", every)
    bin_folder = environment(folder / "environment")
    variables = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    printed = {}
    for language, title, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        if title:
            (folder / title).parent.mkdir(exist_ok=True)
            (folder / title).write_text(text, encoding="utf-8")
            continue
        assert language == "bash", f"{page.name} has a block of {language} that is neither a file nor a command"
        command = ["bash", "-euo", "pipefail", "-c", text]
        done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{page.name}:\n{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        printed[text] = done.stdout
    return printed


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
