"""`dualsft audit` as its user sees it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from dualsft.cli import run
from dualsft.errors import UserError
from dualsft.selection import load_selection
from tests.world.data import sums
from tests.world.jobs import write_inputs, write_job
from tests.world.models import save_tiny_model

SMALL = {"runs": 2, "bands": 2, "pairs": 2}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration for select, fit and audit, and a selection made by it."""
    folder = tmp_path_factory.mktemp("job")
    rows = sums(30)
    written = write_job(
        folder,
        write_inputs(folder, rows[:24], rows[24:]),
        model={
            "model_name_or_path": str(folder / "model"),
            "samples": {"number": 0},
            "warmup": {"fraction": 0.5, "learning_rate": 1e-3},
            "parameter_budget": 0.2,
            "data_budget": 6,
        },
        data={"train": str(folder / "train.jsonl"), "validation": str(folder / "validation.jsonl"), "batch_size": 3},
        optimizer={"class_path": "AdamW", "init_args": {"lr": 1e-3}},
        trainer={"accelerator": "cpu", "enable_progress_bar": False, "max_epochs": 1},
        audit=SMALL,
    )
    run(["select", "--config", str(written), "--output_dir", str(folder / "selection")])
    return folder


def audit(job: Path, output: Path, *more: str) -> None:
    """Run the command over the job."""
    chosen = ["--model.selection", str(job / "selection"), "--output_dir", str(output)]
    run(["audit", "--config", str(job / "job.yaml"), *chosen, *more])


@pytest.mark.heavy
def test_audit_compares_predicted_with_measured(job: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """All sides are judged, with a held-out set too; a second call does nothing again, and gives the same bytes."""
    held_out = ["--audit.held_out", str(job / "validation.jsonl")]
    audit(job, tmp_path / "audit", *held_out)
    told = capfd.readouterr().out
    found = json.loads((tmp_path / "audit" / "audit.json").read_text())
    for side, runs in {"data": 5, "parameters": 5, "joint": 4}.items():
        figures = found[side]["first_order"]
        assert figures["runs"] == runs
        assert figures["steps"] == 2
        assert figures["verdict"] in told
        assert figures["held_out"]["spearman"] == figures["spearman"]  # it is the validation set here
        if side == "joint":  # four runs are too few
            assert figures["spearman"] is figures["slope"] is None
            continue
        assert -1 <= figures["spearman"] <= 1
        assert len(figures["spearman_interval"]) == len(figures["slope_interval"]) == 2
    table = pq.read_table(tmp_path / "audit" / "runs.parquet").to_pylist()
    assert {row["side"] for row in table} == {"data", "parameters", "joint"}
    assert all(row["gain"] == row["held_out_gain"] for row in table)
    assert {path.suffix for path in (tmp_path / "audit" / "figures").iterdir()} == {".png", ".svg"}
    bank = tmp_path / "audit" / "bank"
    before = {path: path.stat().st_mtime_ns for path in bank.rglob("result.json")}
    first = (tmp_path / "audit" / "audit.json").read_bytes()
    audit(job, tmp_path / "audit", *held_out)
    assert {path: path.stat().st_mtime_ns for path in bank.rglob("result.json")} == before
    assert (tmp_path / "audit" / "audit.json").read_bytes() == first


def test_a_dry_run_says_what_would_be_done_and_leaves_no_trace(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It lists every job, and makes no folder."""
    audit(job, tmp_path / "audit", "--dry_run")
    said = capsys.readouterr().out
    assert said.count("to do  fit") == 16
    assert "to do  evaluate  base model" in said
    assert "jobs are to be done" in said
    assert not (tmp_path / "audit").exists()


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["--model.selection", "null"], "model.selection is not given"),
        (["--audit.held_out", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--audit.scorers", "[second_sight]"], "'second_sight' is not registered in dualsft.scorers"),
        (["--parallel", "0"], "parallel=0 is too small"),
        (["--audit.bands", "1"], "audit.bands is 1"),
        (["--data.validation", "null"], "data.validation is not given"),
    ],
)
def test_mistakes_are_told_before_anything_runs(job: Path, tmp_path: Path, more: list[str], problem: str) -> None:
    """One sentence, and no folder."""
    with pytest.raises(UserError, match=problem):
        audit(job, tmp_path / "audit", *more)
    assert not (tmp_path / "audit").exists()


def test_the_selection_belongs_to_what_is_measured(job: Path, tmp_path: Path) -> None:
    """Gains on other validation records than the scores are about, or of another model, are no test of the scores."""
    with pytest.raises(UserError, match=r"data.validation has other records .*validation.jsonl"):
        audit(job, tmp_path / "audit", "--data.validation", str(job / "train.jsonl"))
    other = save_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="made for another model"):
        audit(job, tmp_path / "audit", "--model.model_name_or_path", other)
    assert not (tmp_path / "audit").exists()


def test_weights_without_scores_cannot_be_ranked(job: Path, tmp_path: Path) -> None:
    """Which is told before anything runs; their examples can be."""
    copy = shutil.copytree(job / "selection", tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    (copy / "manifest.json").write_text(json.dumps({**manifest, "parameter_scores": "none"}), encoding="utf-8")
    with pytest.raises(UserError, match=r"weights cannot be ranked; give --audit.sides \[data\]"):
        audit(job, tmp_path / "audit", "--model.selection", str(copy))
    audit(job, tmp_path / "audit", "--model.selection", str(copy), "--audit.sides", "[data]", "--dry_run")


def test_each_setting_has_its_step(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second-order scorer is asked for the step of each setting; the first order's scores are in proportion to it."""
    settings = ["--audit.steps", "[2, 4]", "--audit.scorers", "[first_order, hessian_vector]"]
    audit(job, tmp_path / "audit", *settings, "--dry_run")
    said = capsys.readouterr().out
    assert said.count("select    hessian_vector") == 2 * said.count("select    first_order") > 0


@pytest.mark.parametrize(("limit", "steps"), [("1", 1), ("0.5", 1), ("1.0", 2)])
def test_variants_take_the_steps_of_the_fit(
    limit: str, steps: int, job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As many as its epochs have, of which the trainer may be told to leave batches out."""
    audit(job, tmp_path / "audit", "--trainer.limit_train_batches", limit, "--dry_run")
    assert f"parameters chosen, {steps} steps" in capsys.readouterr().out


def test_what_the_selection_read_may_lie_elsewhere(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A selection that was made with relative paths is audited from another folder, by the audit's paths."""
    made = shutil.copytree(job / "selection", tmp_path / "selection")
    config = (made / "config.yaml").read_text()
    (made / "config.yaml").write_text(config.replace(f"{job}/", "").replace(str(job), ""))
    monkeypatch.chdir(tmp_path)
    audit(job, tmp_path / "audit", "--model.selection", str(made), "--dry_run")
    assert "20 of 20 jobs" in capsys.readouterr().out


def test_interrupted(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command goes on, without an option for it."""

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dualsft.commands.audit.complete", stopped)
    with pytest.raises(UserError, match="interrupted; the same command goes on from what is finished"):
        audit(job, tmp_path / "audit")


def test_another_audit_is_not_replaced_unasked(job: Path, tmp_path: Path) -> None:
    """A folder with other settings, or with files of others, is refused."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"audit": {"runs": 7}}))
    with pytest.raises(UserError, match="holds an experiment with other settings"):
        audit(job, tmp_path)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"did not write \(thesis.tex\)"):
        audit(job, tmp_path)


def test_other_verbs_skip_the_audit_of_a_shared_configuration(job: Path) -> None:
    """The selection was made by a configuration with a section that only audits have."""
    config: dict[str, Any] = yaml.safe_load((job / "job.yaml").read_text())
    assert config["audit"] == SMALL
    assert load_selection(job / "selection").about.counts.examples.selected == 6
