"""The page about comparisons, run as it stands: its files written, its commands run at the repository's root."""

import re
import shlex
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from dualsft.cli import run
from dualsft.commands.compare_jobs import CompareJobs
from dualsft.experiments.bank import Bank
from dualsft.experiments.grid_file import grid_from
from tests.world.embedded import ROOT, embed

PAGE = (ROOT / "docs" / "compare.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r'^```yaml title="(.+?)"\n(.*?)^```$', PAGE, re.DOTALL | re.MULTILINE))
(METHODS,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
COMMANDS = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)[0]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like the repository's root, with the page's files and a sixteenth of what is measured on."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    embed(tmp_path, every=16)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_methods_of_the_page(here: Path) -> None:
    """Every method that the page shows has jobs: its settings are known, and its names are registered."""
    subprocess.run(COMMANDS.splitlines()[0], shell=True, check=True)
    given = {**yaml.safe_load(FILES["grid.yaml"]), "methods": yaml.safe_load(METHODS)["methods"]}
    jobs = CompareJobs(grid_from(given, here), Bank(here / "bank"))
    assert {trial.recipe.method for trial in jobs.trials} == set(given["methods"])


@pytest.mark.heavy
def test_commands_of_the_page(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What the page has a reader run gives the files that it names, through real workers, with every run in them.

    Here it is one of its seeds, and fewer rows. The same again, from what the comparison keeps of its settings, repeats
    no run.
    """
    (here / "grid.yaml").write_text(FILES["grid.yaml"].replace("seeds: [0, 1]", "seeds: [0]"), encoding="utf-8")
    for line in COMMANDS.replace("head -n 200", "head -n 80").splitlines():
        if line.startswith("dualsft "):
            run(shlex.split(line)[1:])
        else:
            subprocess.run(line, shell=True, check=True)
    told = capfd.readouterr().out
    assert "jobs are to be done" in told
    folder = here / "runs" / "compare"
    (table,) = re.findall(r"^## What comes out\n(.*?)^The gain", PAGE, re.DOTALL | re.MULTILINE)
    rows = [row[:60] for row in table.splitlines() if "with `patterns`" not in row]
    names = re.findall(r"`([\w.]+/?)`(?=[^|]*\| )", "\n".join(rows))
    assert {"table.md", "results.parquet"} <= set(names)
    assert [name for name in names if not (folder / name).exists()] == []
    measured = pq.read_table(folder / "results.parquet").to_pylist()
    methods = yaml.safe_load(FILES["grid.yaml"])["methods"]
    assert {row["method"] for row in measured} == {"base model", *methods}
    assert (folder / "failures.json").read_text() == "[]"
    again = ["--output_dir", "runs/again", "--bank", str(folder / "bank")]
    run(["compare", "--config", str(folder / "config.yaml"), *again])
    assert "fits" not in capfd.readouterr().err
    for name in ("results.parquet", "table.md", "table.tex", "figures/gain-against-forgetting.svg"):
        assert (here / "runs" / "again" / name).read_bytes() == (folder / name).read_bytes(), name
