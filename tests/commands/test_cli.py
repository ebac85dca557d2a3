import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from argparse import ArgumentError
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning import Callback, LightningModule
from lightning import Trainer as LightningTrainer
from safetensors.torch import load_file

from dualsft.allocators import GlobalTopK, TopK
from dualsft.cli import VERBS, main, run
from dualsft.commands.select import SelectCLI
from dualsft.errors import UserError
from dualsft.finetune import ExportModel
from dualsft.models.loading import load_model
from dualsft.runs.folder import RunFolder
from dualsft.selection import load_selection
from tests.world.data import write_jsonl
from tests.world.forks import FORKS
from tests.world.jobs import QUIET, write_inputs, write_job
from tests.world.models import VOCABULARY, save_tiny_model, tiny_tokenizer

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
PARTS = ("examples.parquet", "mask.safetensors", "parameter_scores.safetensors", "selected.jsonl")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, a pool, a validation set, and one configuration for the whole job."""
    folder = tmp_path_factory.mktemp("job")
    rows = [{"prompt": f"How many is {n} and {n}?", "response": f"It is {2 * n}."} for n in range(24)]
    model = {
        "scorer": "first_order",
        "parameter_allocator": {"class_path": "global_top_k", "init_args": {"by": "signed"}},
        "warmup": {"fraction": 0.5, "learning_rate": 1e-3},
        "parameter_budget": 0.2,
        "data_budget": 5,
        "generation": {"max_new_tokens": 3},
    }
    write_job(
        folder,
        write_inputs(folder, rows, rows[:4]),
        seed_everything=3,
        model=model,
        data={"batch_size": 4},
        optimizer={"class_path": "AdamW", "init_args": {"lr": 1e-3}},
        trainer={"max_epochs": 2, "log_every_n_steps": 1},
    )
    return folder


@pytest.fixture(scope="module")
def selection(job: Path) -> Path:
    """What `dualsft select` makes of the job."""
    run(["select", "--config", str(job / "job.yaml"), "--output_dir", str(job / "selection")])
    return job / "selection"


@pytest.fixture(scope="module")
def fitted(job: Path, selection: Path) -> Path:
    """What `dualsft fit` makes of the selection."""
    config = ["--config", str(job / "job.yaml"), "--model.selection", str(selection)]
    run(["fit", *config, "--output_dir", str(job / "fit")])
    return job / "fit"


def failure(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str]:
    """Exit code and standard error of the console script."""
    monkeypatch.setattr(sys, "argv", ["dualsft", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    told = capsys.readouterr().err
    return int(stop.value.code or 0), told


@pytest.mark.parametrize("form", ["configuration", "option", "class_path option"])
def test_class_paths_from_before_modules_moved_still_work(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A strategy that is given by the class path it had before its module moved is the same strategy."""
    before, now = "dualsft.distributed.strategy.FSDP2", "dualsft.sharding.strategy.FSDP2"
    strategy = {"class_path": before, "init_args": {"cpu_offload": True}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"trainer": {"strategy": strategy}}))
    offload = ["--trainer.strategy.cpu_offload", "true"]
    given = {
        "configuration": ["--config", str(tmp_path / "job.yaml")],
        "option": [f"--trainer.strategy={before}", *offload],
        "class_path option": ["--trainer.strategy.class_path", before, *offload],
    }
    with pytest.raises(SystemExit):
        run(["select", *given[form], "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)["trainer"]["strategy"]
    assert printed["class_path"] == now
    assert printed["init_args"]["cpu_offload"] is True


def test_one_configuration_serves_every_verb(job: Path, selection: Path, fitted: Path) -> None:
    """select, fit and validate take their own keys from one file; names stand for classes in it."""
    manifest = load_selection(selection).manifest
    assert manifest["parameter_allocator"]["options"] == {"by": "signed", "reverse": False}
    assert manifest["counts"]["examples"]["selected"] == 5
    assert manifest["seed"] == 3
    at = ["--model.model_name_or_path", str(fitted / "model"), "--output_dir", str(job / "evaluation")]
    run(["validate", "--config", str(job / "job.yaml"), *at])
    measured = json.loads((job / "evaluation" / "metrics.json").read_text())
    assert {"loss", "perplexity", "token_accuracy", "exact_match"} <= measured.keys()
    lines = (job / "evaluation" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert sum(json.loads(line)["correct"] for line in lines) == measured["exact_match"] * len(lines)


def test_only_selected_weights_change(job: Path, selection: Path, fitted: Path) -> None:
    """Unselected weights of the exported checkpoint are bit-identical to the base; some selected ones moved."""
    base, tuned = (load_file(folder / "model.safetensors") for folder in (job / "model", fitted / "model"))
    mask = load_selection(selection).mask()
    assert base.keys() == tuned.keys() == mask.keys()
    assert all((base[name] == tuned[name])[~mask[name]].all() for name in mask)
    assert any((base[name] != tuned[name]).any() for name in mask)


def test_saved_configuration_replays_the_run(job: Path, selection: Path, tmp_path: Path) -> None:
    """config.yaml of a selection gives the same scores and the same choice."""
    run(["select", "--config", str(selection / "config.yaml"), "--output_dir", str(tmp_path / "again")])
    for name in PARTS:
        assert (tmp_path / "again" / name).read_bytes() == (selection / name).read_bytes()


def test_print_config_is_replayable(job: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """--print_config prints complete YAML with help comments, which itself is a configuration."""
    with pytest.raises(SystemExit):
        run(["select", "--config", str(job / "job.yaml"), "--print_config"])
    printed = capsys.readouterr().out
    assert "# Share of the pool to fine-tune on before scoring" in printed
    config = yaml.safe_load(printed)
    assert config["model"]["data_budget"] == 5
    assert config["model"]["scorer"]["class_path"] == "dualsft.scorers.FirstOrder"
    (tmp_path / "printed.yaml").write_text(printed)
    run(["select", "--config", str(tmp_path / "printed.yaml"), "--output_dir", str(tmp_path / "out")])
    assert load_selection(tmp_path / "out").manifest["counts"]["examples"]["selected"] == 5


@pytest.fixture
def sets(job: Path, tmp_path: Path) -> dict[str, str]:
    """Two validation sets, whose names do not sort in the order given."""
    lines = (job / "train.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("zeta", lines[:3]), ("b-2", lines[3:8])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    return {name: str(tmp_path / f"{name}.jsonl") for name in ("zeta", "b-2")}


def parsed(capsys: pytest.CaptureFixture[str], verb: str, *arguments: str) -> Any:
    """What a verb makes of `data.validation`."""
    with pytest.raises(SystemExit) as stop:
        run([verb, *arguments, "--print_config"])
    assert not stop.value.code
    return yaml.safe_load(capsys.readouterr().out)["data"]["validation"]


@pytest.mark.parametrize("verb", ["select", "fit", "validate"])
def test_forms_of_named_validation_sets(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A configuration, JSON, and an option per name say the same, in order; a name adds to a mapping."""
    given = {"zeta": "a.jsonl", "b-2": "b.jsonl", "seed": "c.jsonl"}
    (tmp_path / "sets.yaml").write_text(yaml.safe_dump({"data": {"validation": given}}, sort_keys=False))
    config = ["--config", str(tmp_path / "sets.yaml")]
    forms = {
        "configuration": config,
        "JSON": ["--data.validation", json.dumps(given)],
        "options": [part for name, path in given.items() for part in (f"--data.validation.{name}", path)],
        "options with =": [f"--data.validation.{name}={path}" for name, path in given.items()],
    }
    for form, arguments in forms.items():
        assert list(parsed(capsys, verb, *arguments).items()) == list(given.items()), form
    assert parsed(capsys, verb, *config, "--data.validation.b-2", "x", "--data.validation.d", "y") == {
        **given,
        **{"b-2": "x", "d": "y"},
    }
    assert parsed(capsys, verb, *config, "--data.validation", "x") == "x"
    assert parsed(capsys, verb, *config, "--data.validation", '{"d": "y"}') == {"d": "y"}


def test_named_validation_sets_are_reported(
    job: Path, sets: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Validate prints and writes each set's metrics once, fit logs them, and both replay from their configuration."""
    named = [part for name, path in sets.items() for part in (f"--data.validation.{name}", path)]
    at = ["--model.model_name_or_path", str(job / "model"), *QUIET]
    run(["validate", *at, *named, "--output_dir", str(tmp_path / "a")])
    printed = capsys.readouterr().out
    run(["validate", "--config", str(tmp_path / "a" / "config.yaml"), "--output_dir", str(tmp_path / "b")])
    first, again = (json.loads((tmp_path / folder / "metrics.json").read_text()) for folder in ("a", "b"))
    assert first == again
    assert [line.split() for line in printed.splitlines()] == [[name, f"{value:.6g}"] for name, value in first.items()]
    assert {"loss", "loss/zeta", "loss/b-2"} <= first.keys()
    run(["validate", *at, *named, "--verbose", "false"])
    assert capsys.readouterr().out.count("loss/zeta") == 1  # the replay's
    config = ["--config", str(job / "job.yaml"), "--data.validation", json.dumps(sets)]
    run(["fit", *config, "--output_dir", str(tmp_path / "fit")])
    header = (tmp_path / "fit" / "logs" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"val_loss", "val_loss/zeta", "val_loss/b-2"} <= set(header)
    assert yaml.safe_load((tmp_path / "fit" / "config.yaml").read_text())["data"]["validation"] == sets


@pytest.mark.parametrize("verb", ["select", "fit", "validate"])
def test_no_set_is_overwritten(
    verb: str,
    job: Path,
    sets: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """--overwrite of a folder that any of the sets lies in is refused, and the set stays."""
    output = tmp_path / "out"
    (output / "logs").mkdir(parents=True)
    (output / ".unfinished").mkdir()
    inside = Path(sets["b-2"]).rename(output / "logs" / "b-2.jsonl")
    at = ["--config", str(job / "job.yaml"), "--output_dir", str(output), "--overwrite"]
    named = ["--data.validation", json.dumps({**sets, "b-2": str(inside)})]
    code, told = failure([verb, *at, *named], capsys, monkeypatch)
    assert code == 1
    assert f"--overwrite would delete {inside}" in told
    assert inside.is_file()


def test_every_set_is_checked_against_the_vocabulary(
    job: Path, sets: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token that the model has no embedding for is found in the last set, before the folder is touched."""
    model = load_model(str(job / "model"))
    model.resize_token_embeddings(VOCABULARY - 1)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    last = write_jsonl(
        tmp_path / "last.jsonl", [{"prompt": "x", "response": tiny_tokenizer().decode([VOCABULARY - 1])}]
    )
    config = ["--config", str(job / "job.yaml"), "--model.model_name_or_path", str(tmp_path / "model")]
    named = ["--data.validation", json.dumps({**sets, "last": last})]
    code, told = failure(["fit", *config, *named, "--output_dir", str(tmp_path / "out")], capsys, monkeypatch)
    assert code == 1
    assert "The data hold token id 299" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("verb", ["select", "fit", "validate"])
def test_shipped_configurations_parse(path: Path, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every shipped YAML is accepted by every verb, and says which model it is for."""
    with pytest.raises(SystemExit) as stop:
        run([verb, "--config", str(path), "--print_config"])
    assert not stop.value.code
    expected = yaml.safe_load(path.read_text())["model"]["model_name_or_path"]
    assert yaml.safe_load(capsys.readouterr().out)["model"]["model_name_or_path"] == expected


def test_every_option_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    """No option of ours is printed without a word on what it does."""
    for verb in ("select", "fit", "validate"):
        with pytest.raises(SystemExit):
            run([verb, "--print_config"])
        lines = capsys.readouterr().out.splitlines()
        section = ""
        for before, line in itertools.pairwise(lines):
            if line and not line.startswith((" ", "#")):
                section = line.split(":")[0]
            if section in ("model", "data") and ":" in line and not line.strip().startswith("#"):
                assert before.strip().startswith("#"), f"{verb}: {line} has no help"
                assert not before.strip().startswith("# (type"), f"{verb}: {line} has no help"


def test_short_name_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A registered name is taken with a space, with an equals sign, and by help."""
    for given in (["--model.scorer", "first_order"], ["--model.scorer=first_order"]):
        with pytest.raises(SystemExit):
            run(["select", *given, "--print_config"])
        assert "class_path: dualsft.scorers.FirstOrder" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(["select", "--model.parameter_allocator.help", "global_top_k"])
    assert "magnitude" in capsys.readouterr().out


def test_short_names_in_mappings_and_with_options(capsys: pytest.CaptureFixture[str]) -> None:
    """A mapping on the command line may hold a registered name too, and options may follow a name."""
    mapping = ['{"class_path": "hessian_vector", "init_args": {"method": "finite_difference"}}']
    for given in (mapping, ["hessian_vector", "--model.scorer.method", "finite_difference"]):
        with pytest.raises(SystemExit):
            run(["select", "--model.scorer", *given, "--model.step_size", "auto", "--print_config"])
        told = capsys.readouterr().out
        assert "class_path: dualsft.scorers.HessianVector" in told
        assert "method: finite_difference" in told
        assert "step_size: auto" in told


class Refusing(GlobalTopK):
    """A stranger's, whose constructor raises anything."""

    def __init__(self, a: int = 1) -> None:
        raise ValueError("not today\nnor tomorrow")


class Demanding(GlobalTopK):
    """A stranger's, with an option that has no default."""

    def __init__(self, ratio: float) -> None:
        super().__init__()
        self.ratio = ratio


BUDGET = "--model.data_budget"
WEIGHTS = ["--model.parameter_allocator"]
MISTAKES = {
    "seed": (["--seed_everything", "-1"], 1, "seed_everything: These settings cannot be used: -1 is not in bounds"),
    "missing file": (["--data.train", "nowhere.jsonl"], 1, "nowhere.jsonl does not exist"),
    "no budget": ([BUDGET, "0"], 1, "model.data_budget is 0"),
    "fraction above one": ([BUDGET, "1.5"], 1, "model.data_budget is 1.5"),
    "count above the pool": ([BUDGET, "25"], 1, "there are only 24"),
    "count above the weights": (["--model.parameter_budget", "999999999"], 1, "model.parameter_budget is 999,999,999"),
    "unknown column": (["--data.prompt_column", "question"], 1, "no column 'question'"),
    "unknown option": (["--model.scoorer", "x"], 2, "--model.scoorer"),
    "unknown name": (["--model.scorer", "x_rays"], 1, "known names: diagonal_fisher, first_order, hessian_vector"),
    "wrong type": (["--data.batch_tokens", "many"], 2, "data.batch_tokens does not take many: it must be an integer."),
    "none of these": (["--model.order", "sideways"], 2, "model.order does not take sideways: it must be one of both, "),
    "null": (["--model.dtype", "null"], 2, "model.dtype is not given, or null, and needs a value."),
    "a section": (["--model.prior", "0.2"], 2, "model.prior does not take 0.2: it has keys of its own"),
    "option of a class": (
        ["--model.scorer", "diagonal_fisher", "--model.scorer.source", "fisher"],
        2,
        "model.scorer.source does not take fisher: it must be one of second_moment, empirical_fisher.",
    ),
    "unknown option of a class": (
        ["--model.scorer", "diagonal_fisher", "--model.scorer.sorce", "x"],
        2,
        "model.scorer: dualsft.scorers.DiagonalFisher has no option sorce; did you mean source?",
    ),
    "what a class refuses": (
        [*WEIGHTS, "structured", "--model.parameter_allocator.unit", "block", f"{WEIGHTS[0]}.block_size", "0"],
        1,
        "dualsft: error: block_size of structured is 0; give at least 1.",
    ),
    "what a stranger refuses": (
        [*WEIGHTS, "tests.commands.test_cli.Refusing"],
        1,
        "tests.commands.test_cli.Refusing cannot be made with",
    ),
    "a missing option of a class": (
        [*WEIGHTS, "tests.commands.test_cli.Demanding"],
        2,
        "model.parameter_allocator: tests.commands.test_cli.Demanding needs ratio, which is not given",
    ),
    "no such module": (
        [*WEIGHTS, "no_such.Thing"],
        1,
        "no_such.Thing cannot be used in dualsft.parameter_allocators: Mod",
    ),
    "auto without curvature": (["--model.step_size", "auto"], 1, "the scorer FirstOrder has no curvature"),
    "warm-up share": (["--model.warmup.fraction", "2"], 1, "model.warmup.fraction is 2"),
    "adam without warm-up": (["--model.warmup.fraction", "0"], 1, "needs the second moment of a warm-up"),
    "prior": (["--model.prior.weight", "-0.2"], 1, "model.prior.weight is -0.2"),
    "no model": (["--model.model_name_or_path", "./no-such-model"], 1, "./no-such-model"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_in_one_sentence(
    mistake: str, job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake is told in one line that names it, with exit code 1 or 2, and leaves no folder behind."""
    arguments, code, words = MISTAKES[mistake]
    output = tmp_path / "out"
    config = ["--config", str(job / "job.yaml")]
    found, told = failure(["select", *config, *arguments, "--output_dir", str(output)], capsys, monkeypatch)
    assert found == code
    line = told.strip().splitlines()[-1]
    assert line.startswith("dualsft: error: ")
    assert words in line
    assert "Traceback" not in told
    assert not output.exists()


def test_options_are_looked_at_before_the_folder(
    job: Path, selection: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake in the model's or the trainer's options is told, not that the folder is full."""
    for verb, option, words in (
        ("select", [BUDGET, "0"], "model.data_budget is 0"),
        ("fit", ["--trainer.devices", "x"], "`devices`"),
        ("select", [], "already holds files"),
    ):
        command = [verb, "--config", str(job / "job.yaml"), *option, "--output_dir", str(selection)]
        code, told = failure(command, capsys, monkeypatch)
        assert (code, words in told) == (1, True), told


def test_no_such_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All commands are told, those beside the subcommands too."""
    code, told = failure(["alocate", "x"], capsys, monkeypatch)
    assert code == 1
    assert f"no command 'alocate'; did you mean allocate? Its commands are {', '.join(VERBS)}." in told
    assert {"select", "fit", "audit", "compare"} <= VERBS.keys()


def test_help_for_a_class_without_options(capsys: pytest.CaptureFixture[str]) -> None:
    """Its docstring is shown, where there are no options to show."""
    with pytest.raises(SystemExit) as stop:
        run(["select", "--model.scorer.help", "first_order"])
    assert not stop.value.code
    told = capsys.readouterr().out
    assert "First-order utility: how well a gradient agrees" in told
    assert "It has no options." in told


def test_names_stand_for_classes_wherever_a_class_may_stand(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a section, under a dotted key, and in a file of the part's own."""
    (tmp_path / "part.yaml").write_text("class_path: structured\ninit_args: {unit: column}\n")
    (tmp_path / "flat.yaml").write_text("model.parameter_allocator: structured\n")
    (tmp_path / "nested.yaml").write_text("model: {parameter_allocator: structured}\n")
    given = {
        "column": [*WEIGHTS, str(tmp_path / "part.yaml")],
        "row": ["--config", str(tmp_path / "flat.yaml")],
        "block": ["--config", str(tmp_path / "nested.yaml"), f"{WEIGHTS[0]}.unit", "block"],
    }
    for unit, arguments in given.items():
        with pytest.raises(SystemExit):
            run(["select", "--config", str(job / "job.yaml"), *arguments, "--print_config"])
        printed = yaml.safe_load(capsys.readouterr().out)["model"]["parameter_allocator"]
        assert (printed["class_path"], printed["init_args"]["unit"]) == ("dualsft.allocators.Structured", unit)


def test_an_allocator_s_options_go_with_it(selection: Path, tmp_path: Path) -> None:
    """They stay as they were as long as the allocator does; another one has its own defaults, whatever they share."""
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    ranking = [*WEIGHTS, "global_top_k", f"{WEIGHTS[0]}.by", "signed", "--model.data_allocator.reverse", "true"]
    run(["allocate", str(selection), *ranking, "--output_dir", str(first)])
    (tmp_path / "c.yaml").write_text("model: {data_allocator: dualsft.allocators.top_k.TopK}\n")
    changed = [*WEIGHTS, "uniform_per_layer", "--config", str(tmp_path / "c.yaml"), BUDGET, "3"]
    run(["allocate", str(first), *changed, "--output_dir", str(second)])
    manifest = load_selection(second).manifest
    assert manifest["parameter_allocator"]["options"] == {"by": "magnitude"}
    assert manifest["data_allocator"]["options"] == {"reverse": True}
    run(["allocate", str(first), *WEIGHTS, "global_top_k", BUDGET, "3", "--output_dir", str(third)])
    assert load_selection(third).manifest["parameter_allocator"]["options"] == {"by": "signed", "reverse": False}


class Secretive(TopK):
    """A stranger's, which keeps its option under another name than it takes it by."""

    def __init__(self, count: int = 1) -> None:
        super().__init__()
        self._count = count


def test_what_cannot_be_made_again_must_be_given(
    selection: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An option that the manifest cannot give back is not silently another one."""
    first, data = tmp_path / "first", "--model.data_allocator"
    own = [data, "tests.commands.test_cli.Secretive", f"{data}.count"]
    run(["allocate", str(selection), *own, "7", "--output_dir", str(first)])
    code, told = failure(
        ["allocate", str(first), BUDGET, "3", "--output_dir", str(tmp_path / "a")], capsys, monkeypatch
    )
    assert (code, f"The model.data_allocator of {first} cannot be made again" in told) == (1, True)
    run(["allocate", str(selection), *own, "1", "--output_dir", str(tmp_path / "default")])
    run(["allocate", str(tmp_path / "default"), BUDGET, "3", "--output_dir", str(tmp_path / "b")])


def test_broken_row_is_named(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken JSON row is told by file, line and row."""
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", "response": }\n')
    config = ["--config", str(job / "job.yaml"), "--data.train", str(broken)]
    code, told = failure(["select", *config, "--output_dir", str(tmp_path / "out")], capsys, monkeypatch)
    assert code == 1
    assert "broken.jsonl, line 2 (row 1)" in told


def test_selection_of_other_data_or_model_is_refused(
    job: Path, selection: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fit compares fingerprints of the pool and of the base weights before it touches the output folder."""
    config = ["fit", "--config", str(job / "job.yaml"), "--model.selection", str(selection)]
    output = ["--output_dir", str(tmp_path / "out")]
    other_data = write_jsonl(tmp_path / "other.jsonl", [{"prompt": "a", "response": "b"}] * 24)
    code, told = failure([*config, "--data.train", other_data, *output], capsys, monkeypatch)
    assert code == 1
    assert "made for other data" in told
    other_model = save_tiny_model(tmp_path / "model", seed=1)
    code, told = failure([*config, "--model.model_name_or_path", other_model, *output], capsys, monkeypatch)
    assert code == 1
    assert "made for another model" in told
    assert not (tmp_path / "out").exists()


def test_finished_folder_is_not_overwritten_unasked(
    job: Path, selection: Path, fitted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that holds a finished run is refused, and left as it was."""
    for verb, folder in (("select", selection), ("fit", fitted)):
        before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
        code, told = failure(
            [verb, "--config", str(job / "job.yaml"), "--output_dir", str(folder)], capsys, monkeypatch
        )
        assert code == 1
        assert "--overwrite" in told
        assert before == sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))


def test_output_dir_is_required(job: Path) -> None:
    """Both verbs say so when they are not told where to write."""
    for verb in ("select", "fit"):
        with pytest.raises(UserError, match="--output_dir is not given"):
            run([verb, "--config", str(job / "job.yaml")])


ALLOCATIONS: dict[str, list[str]] = {
    "other budgets": ["--model.data_budget", "0.5", "--model.parameter_budget", "77"],
    "everything": ["--model.data_budget", "null", "--model.parameter_budget=null"],
    "an override": ["--model.parameter_allocator.reverse", "true", "--model.parameter_budget", "1.0e-1"],
    "a name": ["--model.data_allocator=top_k", "--model.parameter_allocator", "global_top_k"],
    "a class": [
        '--model.parameter_allocator={"class_path": "dualsft.allocators.GlobalTopK", "init_args": {"reverse": true}}'
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("options", ALLOCATIONS)
def test_allocate_is_select_without_the_scoring(job: Path, selection: Path, tmp_path: Path, options: str) -> None:
    """The files are those of a select with the same options over the same configuration, and replay to the same."""
    changed = ALLOCATIONS[options]
    config = ["--config", str(job / "job.yaml")]
    run(["select", *config, *changed, "--output_dir", str(tmp_path / "selected")])
    run(["allocate", str(selection), *changed, "--output_dir", str(tmp_path / "alone")])
    run(["allocate", str(selection), *config, *changed, "--output_dir", str(tmp_path / "shared")])
    replay = ["--config", str(tmp_path / "alone" / "config.yaml")]
    run(["allocate", *replay, "--output_dir", str(tmp_path / "replayed")])
    expected = load_selection(tmp_path / "selected").manifest
    for name in ("alone", "shared", "replayed"):
        made = load_selection(tmp_path / name)
        assert {**made.manifest, "phases": expected["phases"]} == {
            **expected,
            "allocated_from": made.manifest["allocated_from"],
        }
        for part in PARTS:
            assert (made.folder / part).read_bytes() == (tmp_path / "selected" / part).read_bytes(), (name, part)
    assert made.manifest["allocated_from"]["folder"] == str(selection)


def test_allocate_keeps_what_is_not_given(selection: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Budgets and allocators stay those of the selection, which is not those of `select` by default."""
    run(["allocate", str(selection), "--output_dir", str(tmp_path / "out"), "--model.parameter_budget", "null"])
    assert "5 of 24 selected" in capsys.readouterr().out
    manifest = load_selection(tmp_path / "out").manifest
    assert manifest["budgets"] == {"parameters": None, "data": 5}
    assert manifest["parameter_allocator"]["options"] == {"by": "signed", "reverse": False}
    lowest = ["--model.data_budget", "2", "--model.data_allocator.reverse", "true"]
    run(["allocate", str(tmp_path / "out"), "--output_dir", str(tmp_path / "next"), *lowest])
    made = load_selection(tmp_path / "next")
    assert made.manifest["budgets"] == {"parameters": None, "data": 2}
    scores = made.examples["score"].to_pylist()
    assert made.example_ids == sorted(sorted(range(24), key=lambda i: (scores[i], i))[:2])


def test_fit_takes_an_allocation(job: Path, selection: Path, tmp_path: Path) -> None:
    """It is a selection like any other: a fit changes the weights of its mask alone."""
    run(["allocate", str(selection), "--model.parameter_budget", "9", "--output_dir", str(tmp_path / "chosen")])
    config = ["--config", str(job / "job.yaml"), "--model.selection", str(tmp_path / "chosen")]
    run(["fit", *config, "--output_dir", str(tmp_path / "fit")])
    base, tuned = (load_file(f / "model.safetensors") for f in (job / "model", tmp_path / "fit" / "model"))
    mask = load_selection(tmp_path / "chosen").mask()
    changed = sum(int((base[name] != tuned[name]).sum()) for name in base)
    assert 0 < changed <= 9
    assert all((base[name] == tuned[name])[~mask[name]].all() for name in mask)


def test_allocate_has_help_for_every_option(selection: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a selection what is not given is said to stay; with one, and when printed, the values are there."""
    with pytest.raises(SystemExit) as stop:
        run(["allocate", "--help"])
    assert not stop.value.code
    told = " ".join(capsys.readouterr().out.split())
    assert "usage: dualsft allocate SELECTION --output_dir DIR" in told
    assert told.count("default: as in SELECTION") == 10
    with pytest.raises(SystemExit):
        run(["allocate", "--model.parameter_allocator.help", "global_top_k"])
    assert "Choose the lowest instead" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(["allocate", str(selection), "--print_config"])
    printed = capsys.readouterr().out
    config = yaml.safe_load(printed)
    assert config["selection"] == str(selection)
    assert config["model"]["data_budget"] == 5
    assert config["model"]["parameter_allocator"]["init_args"] == {"by": "signed", "reverse": False}
    lines = printed.splitlines()
    for before, line in itertools.pairwise(lines[lines.index("model:") :]):
        if line.startswith("  ") and line.strip()[0] != "#" and line.split(":")[0].strip() != "class_path":
            assert before.strip().startswith("#") or "init_args" in before + line, f"{line} has no help"


ALLOCATE_MISTAKES: dict[str, tuple[list[str], int, str]] = {
    "no budget": ([BUDGET, "0"], 1, "model.data_budget is 0"),
    "count above the pool": ([BUDGET, "25"], 1, "there are only 24"),
    "count above the weights": (["--model.parameter_budget", "999999999"], 1, "model.parameter_budget is 999,999,999"),
    "wrong type": ([BUDGET, "many"], 2, "model.data_budget does not take many"),
    "missing file": (["--data.train", "nowhere.jsonl"], 1, "nowhere.jsonl does not exist"),
    "unknown option": (["--model.data_budgets", "3"], 2, "--model.data_budgets"),
    "another verb's option": (["--model.step_size", "3"], 2, "--model.step_size"),
    "unknown name": (["--model.data_allocator", "x_rays"], 1, "known names: diverse, "),
    "unknown argument": (["--model.data_allocator.by", "signed"], 2, "model.data_allocator"),
    "missing configuration": (["--config", "nowhere.yaml"], 1, "nowhere.yaml cannot be read"),
    "linked key": (["--data.tokenizer", "x"], 1, "set that"),
    "two selections": (["runs/other"], 2, "runs/other"),
}


@pytest.mark.parametrize("mistake", ALLOCATE_MISTAKES)
def test_mistakes_in_an_allocation_end_in_one_sentence(
    mistake: str, selection: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake is told in one line that names it, with exit code 1 or 2, and leaves no folder behind."""
    arguments, code, words = ALLOCATE_MISTAKES[mistake]
    command = ["allocate", str(selection), *arguments, "--output_dir", str(tmp_path / "out")]
    found, told = failure(command, capsys, monkeypatch)
    assert found == code
    (line,) = told.strip().splitlines()
    assert line.startswith("dualsft: error: ")
    assert words in line
    assert not (tmp_path / "out").exists()


def test_allocate_needs_a_finished_selection_and_a_folder(
    selection: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is missing is told: the selection, what makes it one, or where to write."""
    output = ["--output_dir", str(tmp_path / "out")]
    for arguments, words in (
        (output, "The selection is not given; name it first"),
        ([*output, str(selection)], "The selection is not given; name it first"),
        ([str(tmp_path / "nowhere"), *output], "no such selection directory"),
        ([str(tmp_path), *output], "is not a finished selection"),
        ([str(selection)], "--output_dir is not given"),
        ([str(selection), "--output_dir", str(selection), "--overwrite"], "which this run reads"),
    ):
        code, told = failure(["allocate", *arguments], capsys, monkeypatch)
        assert code == 1
        assert words in told
        assert len(told.splitlines()) == 1


def test_an_allocator_that_cannot_be_made_again(
    selection: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its package is gone, or its options are not what it takes, another must be given; then all is well."""
    for number, stored in enumerate(
        (
            {"class_path": "gone.Allocator", "options": {}},
            {"class_path": "dualsft.allocators.TopK", "options": {"x": 1}},
        )
    ):
        other = shutil.copytree(selection, tmp_path / f"other-{number}")
        manifest = json.loads((other / "manifest.json").read_text())
        (other / "manifest.json").write_text(json.dumps({**manifest, "data_allocator": stored}))
        command = ["allocate", str(other), "--output_dir", str(tmp_path / f"out-{number}")]
        code, told = failure(command, capsys, monkeypatch)
        assert code == 1
        assert "model.data_allocator" in told
        assert "give --model.data_allocator" in told
        run([*command, "--model.data_allocator", "top_k"])
        made = load_selection(tmp_path / f"out-{number}")
        assert made.example_ids == load_selection(selection).example_ids


def test_a_key_that_no_verb_knows_is_refused_by_allocate(
    job: Path, selection: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shared configuration may hold any verb's keys, and no others."""
    config = yaml.safe_load((job / "job.yaml").read_text())
    config["model"]["data_budgets"] = 3
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(config))
    command = ["allocate", str(selection), "--config", str(tmp_path / "wrong.yaml"), "--output_dir"]
    code, told = failure([*command, str(tmp_path / "out")], capsys, monkeypatch)
    assert code == 2
    assert "data_budgets" in told


def test_plugins_lists_what_is_registered(capsys: pytest.CaptureFixture[str]) -> None:
    """Every built-in name, its class and its package are listed."""
    run(["plugins"])
    told = capsys.readouterr().out
    for name in ("first_order", "target", "global_top_k", "top_k", "dualsft.scorers:FirstOrder", "dualsft.paths\n"):
        assert name in told


@pytest.mark.heavy
def test_module_runs_as_the_script_does() -> None:
    """`python -m dualsft` is the same program, and ends with code 1 on a mistake."""
    done = subprocess.run(
        [sys.executable, "-m", "dualsft", "plugins", "x"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.strip() == "dualsft: error: dualsft plugins takes no arguments, but was given x."


STOPPING = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor"]
ACCUMULATE = ["--trainer.callbacks+=GradientAccumulationScheduler", "--trainer.callbacks.scheduling={0: 2}"]
CYCLE = ["--lr_scheduler.base_lr=0.1", "--lr_scheduler.max_lr=0.2", "--lr_scheduler.step_size_up=0"]
FIT_MISTAKES = {
    "half-precision trainer": (["--trainer.precision", "bf16-true"], 1, "trainer.precision is bf16-true"),
    "several processes": (["--trainer.devices", "2"], 1, "fit cannot run on 2 processes"),
    "strategy": (["--trainer.strategy", "ddp_spawn"], 1, "DDPStrategy"),
    "no validation set": (["--data.validation", "{}"], 1, "data.validation is an empty mapping"),
    "name of a set": (["--data.validation.a.b", "x"], 1, "data.validation names a set 'a.b'"),
    "missing set": (["--data.validation.a", "nowhere.jsonl"], 1, "data.validation.a: nowhere.jsonl does not exist"),
    "small batches": (["--data.batch_tokens", "3"], 1, "data.batch_tokens"),
    "divergence": (["--optimizer.lr", "1e30"], 1, "training loss became"),
    "learning rate": (["--optimizer.lr", "-1"], 1, "Invalid learning rate: -1"),
    "accelerator": (["--trainer.accelerator", "cuda"], 1, "These settings cannot be used"),
    "linked key": (["--data.selection", "x"], 1, "set that"),
    "union": (["--trainer.precision", "8"], 2, "trainer.precision does not take 8"),
    "monitor": ([*STOPPING, "val_los"], 1, "EarlyStopping in trainer.callbacks monitors 'val_los'"),
    "monitor of nothing": (["--data.validation=null", *STOPPING, "val_loss"], 1, "give one of train_loss."),
    "monitor of best": (["--model.export=best", *STOPPING, "val_los"], 1, "'val_los', which is not logged"),
    "plateau": (
        ["--lr_scheduler=ReduceLROnPlateau", "--lr_scheduler.monitor=x"],
        1,
        "(ReduceLROnPlateau) monitors 'x'",
    ),
    "schedule that fails later": (["--lr_scheduler=StepLR", "--lr_scheduler.step_size=0"], 1, "StepLR fails after 1"),
    "schedule": (["--lr_scheduler=CyclicLR", *CYCLE], 1, "schedule cannot be made: float division by zero"),
    "validation too late": (["--trainer.val_check_interval=999"], 1, "`val_check_interval` (999) must be less"),
    "two accumulations": (["--trainer.accumulate_grad_batches=2", *ACCUMULATE], 1, "Either remove"),
    "other fine-tuning": (["--trainer.callbacks+=BackboneFinetuning"], 1, "BackboneFinetuning chooses itself"),
    "nothing to train on": (["--trainer.limit_train_batches=0"], 1, "trainer.limit_train_batches is 0"),
    "overfit": (["--trainer.overfit_batches=2"], 1, "trainer.overfit_batches is 2"),
    "negative clipping": (["--trainer.gradient_clip_val=-1"], 1, "trainer.gradient_clip_val is -1"),
    "other folder": (
        ["--model.samples.number=1", "--trainer.default_root_dir=/proc/x"],
        1,
        "/proc/x cannot be used: No such file",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", FIT_MISTAKES)
def test_mistakes_in_a_fit_leave_the_folder_free(
    mistake: str, job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake in a fit is told in one line and leaves nothing behind, so the corrected command can run."""
    arguments, code, words = FIT_MISTAKES[mistake]
    config = ["fit", "--config", str(job / "job.yaml"), *arguments, "--output_dir", str(tmp_path / "out")]
    found, told = failure(config, capsys, monkeypatch)
    assert found == code
    assert words in told.strip().splitlines()[-1]
    assert "Traceback" not in told
    assert not (tmp_path / "out").exists()


def test_metrics_of_other_callbacks_can_be_monitored(job: Path, tmp_path: Path) -> None:
    """Early stopping may go by what a callback of the user's logs; Timer's defaults can be written down."""
    callbacks = [f"--trainer.callbacks+={__name__}.LogsItsOwn", "--trainer.callbacks+=Timer", *STOPPING, "own"]
    run(["fit", "--config", str(job / "job.yaml"), *callbacks, "--output_dir", str(tmp_path / "out")])
    written = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert written["trainer"]["callbacks"][1]["init_args"]["interval"] == "step"


class LogsItsOwn(Callback):
    """Logs a metric that the module knows nothing of."""

    def on_train_epoch_end(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        """Log it."""
        pl_module.log("own", 1.0)


def test_text_options_are_taken_as_they_are(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pattern that begins with a hash sign is not a comment, on the command line or in a file read with -c."""
    for config in ("--config", "-c"):
        pattern = ["--model.generation.answer_pattern", "#### (.+)"]
        with pytest.raises(SystemExit):
            run(["validate", config, str(job / "job.yaml"), *pattern, "--print_config"])
        printed = yaml.safe_load(capsys.readouterr().out)
        assert printed["model"]["generation"]["answer_pattern"] == "#### (.+)"


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_own_checkpoints_are_resumed_from(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ModelCheckpoint of the user's, wherever in the output folder it writes, is what --resume goes on from."""
    checkpoint = ["--trainer.callbacks+", "ModelCheckpoint", "--trainer.callbacks.every_n_epochs", "1"]
    command = ["fit", "--config", str(job / "job.yaml"), *checkpoint, "--output_dir", str(tmp_path / "out")]
    with monkeypatch.context() as broken:
        broken.setattr(ExportModel, "on_fit_end", lambda *_: (_ for _ in ()).throw(RuntimeError("power cut")))
        with pytest.raises(RuntimeError, match="power cut"):
            run(command)
    assert list((tmp_path / "out").glob("logs/version_0/checkpoints/*.ckpt"))
    run([*command, "--resume"])
    assert (tmp_path / "out" / "model").is_dir()
    assert not list((tmp_path / "out").glob("logs/version_1/metrics.csv")), "the finished epochs were trained again"


@pytest.mark.heavy
def test_killed_fit_resumes_to_the_same_weights(job: Path, selection: Path, tmp_path: Path) -> None:
    """SIGKILL after the first checkpoint, then --resume: the exported weights equal those of an unbroken run."""
    config = [
        "fit",
        "--config",
        str(job / "job.yaml"),
        "--model.selection",
        str(selection),
        "--trainer.max_epochs",
        "20",
    ]
    broken = tmp_path / "broken"
    run([*config, "--output_dir", str(tmp_path / "unbroken")])
    process = FORKS.Process(target=run, args=([*config, "--output_dir", str(broken)],))
    process.start()
    while process.is_alive() and not list(broken.glob("checkpoints/*.ckpt")):
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (broken / "model").exists()
    with pytest.raises(UserError, match="--resume"):
        run([*config, "--output_dir", str(broken)])
    run([*config, "--output_dir", str(broken), "--resume"])
    for name in ("model/model.safetensors", "delta.safetensors"):
        assert (broken / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()


def test_configurations_may_come_before_the_verb(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In each spelling, and several of them, as if they came right behind it."""
    config = str(job / "job.yaml")
    printed = []
    for given in (["fit", "--config", config], ["--config", config, "fit"], [f"-c={config}", "-c", config, "fit"]):
        with pytest.raises(SystemExit):
            run([*given, "--seed_everything", "5", "--print_config"])
        lines = capsys.readouterr().out.splitlines()
        printed.append([line for line in lines if not line.lstrip().startswith("#")])  # these name what is imported
    assert printed[0] == printed[1] == printed[2]
    assert "seed_everything: 5" in printed[0]
    with pytest.raises(ArgumentError, match="name a command"):
        run(["--config", config])


def test_an_overridden_class_leaves_no_empty_options(job: Path, tmp_path: Path) -> None:
    """A name given over a class with options replays as if it had been given alone."""
    scorer = {"class_path": "diagonal_fisher", "init_args": {"source": "second_moment"}}
    (tmp_path / "scorer.yaml").write_text(yaml.safe_dump({"model": {"scorer": scorer}}))
    replays = []
    for given in (["--config", str(tmp_path / "scorer.yaml")], []):
        command = SelectCLI(
            ["--config", str(job / "job.yaml"), *given, "--model.scorer", "first_order", "--output_dir", "out"]
        )
        replays.append(yaml.safe_load(command.replay))
    assert replays[0] == replays[1]
    assert replays[0]["model"]["scorer"] == {"class_path": "dualsft.scorers.FirstOrder"}


def test_validate_does_not_advise_what_it_has_not(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unfinished run in its folder can be dropped, but not resumed by it."""
    RunFolder(tmp_path / "out").claim({"command": "select"})
    command = ["validate", "--config", str(job / "job.yaml"), "--output_dir", str(tmp_path / "out")]
    code, told = failure(command, capsys, monkeypatch)
    assert (code, "give --overwrite to drop it" in told, "--resume" in told) == (1, True, False)
    code, told = failure([*command, "--resume"], capsys, monkeypatch)
    assert code == 2
