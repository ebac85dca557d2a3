"""`dualsft plan`: what it prints, and what it refuses."""

import re
from pathlib import Path

import pytest
import yaml

from dualsft.cli import run
from dualsft.errors import UserError
from dualsft.plans.sizes import parse_memory
from tests.plans.cases import write_config
from tests.world.jobs import write_inputs, write_job

SETTINGS: dict[str, dict[str, object]] = {
    "model": {
        "scorer": "first_order",
        "preconditioner": "none",
        "warmup": {"fraction": 0.0},
        "parameter_budget": 0.25,
        "selection": "none-yet",
    },
    "data": {"train": "pool.jsonl", "validation": "v.jsonl", "max_length": 16, "batch_tokens": 64, "batch_size": 2},
    "trainer": {"accelerator": "gpu"},
}


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A configuration of both commands, for a model of which there is a config.json alone."""
    folder = write_config(tmp_path / "model")
    model = {**SETTINGS["model"], "model_name_or_path": str(folder)}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**SETTINGS, "model": model}), encoding="utf-8")
    return str(tmp_path / "c.yaml")


@pytest.mark.slow
def test_phases_peaks_and_remedies_are_printed(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A selection that does not fit is told by how much, and what each change would lead to."""
    run(["plan", "--config", config, "--memory", "200KiB", "--pool_tokens", "1e6", "--throughput", "100"])
    out = capsys.readouterr().out
    assert "| validation gradient |" in out
    assert "Highest peak: " in out
    assert "does not fit" in out
    assert "| data.batch_tokens 16 " in out
    assert " and trainer.strategy fsdp2 " in out
    assert "Time at 100 TFLOP/s" in out


@pytest.mark.slow
def test_a_fit_is_planned_by_the_same_configuration(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A selection that is still to be made tells by its budget how much is trained."""
    run(["plan", "--for", "fit", "--config", config, "--memory", "80GiB", "--trainer.accumulate_grad_batches", "4"])
    out = capsys.readouterr().out
    assert "Trained: 25% of each tensor's weights" in out
    assert "gradients" in out
    assert "fits in 80.0 GiB" in out


@pytest.mark.slow
def test_a_fused_optimizer_holds_nothing_in_passing(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The step of torch's default on a GPU holds a copy of all masters; a fused one's takes no column."""
    fit = ["plan", "--for", "fit", "--config", config, "--optimizer", "AdamW", "--optimizer.lr", "1e-5"]
    steps = []
    for fused in ("false", "true"):
        run([*fit, "--trainer.accumulate_grad_batches", "4", "--optimizer.fused", fused])
        steps.append(" step |" in capsys.readouterr().out)
    assert steps == [True, False]


@pytest.mark.slow
def test_a_finished_selection_tells_what_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its counts, and whether its weights are whole rows, whatever the configuration would ask for."""
    inputs = write_inputs(tmp_path)
    model = {"preconditioner": "none", "warmup": {"fraction": 0.0}, "parameter_budget": 0.25}
    job = write_job(tmp_path, inputs, model={**model, "parameter_allocator": "structured"})
    run(["select", "--config", str(job), "--output_dir", str(tmp_path / "s")])
    capsys.readouterr()
    base = ["--model.model_name_or_path", inputs.model, "--data.train", inputs.train]
    run(["plan", "--for", "fit", *base, "--model.selection", str(tmp_path / "s"), "--trainer.accelerator", "cpu"])
    assert "Trained: 25% of each tensor's weights, as whole rows" in capsys.readouterr().out


@pytest.mark.heavy
def test_a_probe_shows_peaks_and_times(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of a path too, beside the plan's; the output folder stays as it was, and a mistake is told by the run."""
    inputs = write_inputs(tmp_path)
    job = write_job(tmp_path, inputs, model={"path": {"along": "target", "held_out": 0.0}, "dtype": "float32"})
    arguments = ["plan", "--probe", "--config", str(job), "--output_dir", str(tmp_path / "s")]
    before = sorted(path.name for path in tmp_path.iterdir())
    run(arguments)
    out = capfd.readouterr().out
    for phase in ("warm-up", "path", "pool loss", "validation"):
        assert re.search(rf"^\| {phase} +\| +[\d.]+ +\| +\d", out, re.MULTILINE), phase
    assert "Time of all: " in out
    with pytest.raises(UserError, match="the probe's select ended with exit code 1; what it says stands above"):
        run([*arguments, "--model.model_name_or_path", inputs.model, "--data.max_length", "2"])
    assert "dualsft: error: " in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(("text", "size"), [("80GiB", 80 * 2**30), ("80gb", 80 * 10**9), ("24G", 24 * 2**30)])
def test_memory_is_read_as_people_write_it(text: str, size: int) -> None:
    """Powers of 1,024 and of 1,000 are told apart."""
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["lots", "-3GiB", "0GiB", "80 GiB free", ""])
def test_other_memory_is_refused(text: str) -> None:
    """One sentence says what to write."""
    with pytest.raises(UserError, match=r"--memory is .*; give an amount such as 80GiB"):
        parse_memory(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.model_name_or_path", "./nowhere"], "no such folder; give one that holds a config.json"),
        (["--trainer.devices", "8"], "set trainer.strategy to ddp"),
        (
            ["--trainer.devices", "8", "--trainer.strategy", "deepspeed"],
            "strategy 'deepspeed'; set trainer",
        ),
        (["--trainer.num_nodes", "2", "--trainer.strategy", "hsdp"], "over a single rank; set trainer.strategy to ddp"),
        (["--trainer.devices", "auto"], "a plan needs their number"),
        (["--supervised", "2"], "--supervised is 2"),
        (["--model.path.along", "pool", "--model.warmup.fraction", "0.1"], "set model.path.along to target or null"),
    ],
)
def test_what_cannot_be_planned_is_refused(config: str, arguments: list[str], message: str) -> None:
    """Each mistake ends in one sentence."""
    with pytest.raises(UserError, match=message):
        run(["plan", "--config", config, *arguments])
