"""A pool of several sources through the commands: select, allocate, fit and validate read it as it was given."""

import json
from pathlib import Path
from typing import Any

import pytest

from dualsft.cli import run
from dualsft.errors import UserError
from dualsft.selection import load_selection
from tests.world.data import write_jsonl
from tests.world.jobs import Inputs, write_inputs, write_job

GSM8K = [{"question": f"What is {k} + {k}?", "answer": f"It is {2 * k}."} for k in range(6)]
CODE = [{"prompt": f"Write {k}", "completion": f"print({k})"} for k in range(5)]
QUOTA = {"class_path": "per_source_quota", "init_args": {"shares": "equal"}}


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Inputs]:
    """A configuration with a pool of two named sources in different columns, one of them capped."""
    inputs = write_inputs(tmp_path)
    for name, rows in (("gsm8k", GSM8K), ("code", CODE)):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    train = {"maths": {"path": "gsm8k.jsonl", "cap": 4}, "programs": "code.jsonl"}
    model = {"preconditioner": "none", "warmup": {"fraction": 0.0}, "data_budget": 4, "data_allocator": QUOTA}
    config = write_job(tmp_path, inputs, model=model, data={"max_length": 48, "train": train})
    return str(config), inputs


def rows(folder: str) -> list[dict[str, Any]]:
    """The selected records."""
    return [json.loads(line) for line in Path(folder, "selected.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_a_mixed_pool_is_selected_from_and_trained_on(
    job: tuple[str, Inputs], capsys: pytest.CaptureFixture[str]
) -> None:
    """Names are the quota's sources, records stay as they are, and other commands find the pool by the manifest."""
    config, _ = job
    run(["select", "--config", config, "--output_dir", "s"])
    assert "maths: 4 of its 6 records are taken at random (cap 4, seed 0), 2 are left out." in capsys.readouterr().err
    assert [row in GSM8K for row in rows("s")] == [True, True, False, False]
    assert all(row in GSM8K + CODE for row in rows("s"))
    assert load_selection("s").about.counts.examples.rows == 9
    run(["allocate", "s", "--output_dir", "t", "--model.data_budget", "6"])
    assert [row in GSM8K for row in rows("t")] == [True] * 3 + [False] * 3
    run(["select", "--config", "s/config.yaml", "--resume", "--output_dir", "s"])
    run(["fit", "--config", config, "--model.selection", "s", "--model.samples.number", "0", "--output_dir", "f"])
    assert json.loads(Path("f/metrics.json").read_text(encoding="utf-8"))["examples"]["each_epoch"] == 4
    with pytest.raises(UserError, match="was made for other data: 9 rows against 10"):
        run(["fit", "--config", config, "--model.selection", "s", "--data.train", "train.jsonl", "--output_dir", "g"])


@pytest.mark.slow
def test_sources_on_the_command_line(job: tuple[str, Inputs]) -> None:
    """A list replaces a configuration's sources, a dotted name adds to them, and a list is one validation set."""
    config, inputs = job
    common = ["--config", config, "--model.data_allocator", "top_k", "--model.data_budget", "1.0"]
    validation = ["--data.validation", f"[{inputs.validation}, gsm8k.jsonl]"]
    run(["select", *common, *validation, "--data.train", "[code.jsonl, gsm8k.jsonl]", "--output_dir", "list"])
    assert rows("list") == CODE + GSM8K
    run(["select", *common, "--data.train.more", "{path: code.jsonl, share: 0.2}", "--output_dir", "added"])
    assert [row for row in rows("added") if row in CODE][:5] == CODE
    assert len(rows("added")) == 4 + 5 + 1
    run(["select", *common, "--data.train", "[cg]*.jsonl", "--output_dir", "glob"])
    assert rows("glob") == CODE + GSM8K


def test_a_source_is_never_overwritten(job: tuple[str, Inputs]) -> None:
    """An output folder that holds one of several sources is refused."""
    config, _ = job
    run(["select", "--config", config, "--output_dir", "s"])
    given = ["--data.train.chosen", "s/selected.jsonl"]
    with pytest.raises(UserError, match=r"--overwrite would delete s/selected\.jsonl, which this run reads"):
        run(["select", "--config", config, *given, "--output_dir", "s", "--overwrite"])
