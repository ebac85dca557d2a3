"""Paths as options: one meaning in all of them, and output folders that cannot be written told before any work."""

from pathlib import Path
from typing import Any

import pytest
from jsonargparse import Namespace

from dualsft.cli import run
from dualsft.commands.path_options import expand_paths
from dualsft.errors import UserError
from dualsft.selection import load_selection
from tests.world.jobs import Inputs, write_inputs, write_job

SMALL = {"preconditioner": "none", "warmup": {"fraction": 0.0}}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, a variable that names it too, and an empty working folder."""
    for name in ("home", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PLACE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "home"


def test_each_path_option(home: Path) -> None:
    """Shorthands are written out under every key, in mappings of names, and in what belongs to Lightning."""
    callback = Namespace(class_path="ModelCheckpoint", init_args=Namespace(dirpath="~/c", filename="~x"))
    given = Namespace(output_dir="~/o", task_folder=None, selection="$PLACE/s")
    given.model = Namespace(model_name_or_path="~/m", selection="~/s", warmup=Namespace(checkpoint="~/w"))
    given.data = Namespace(train="~/t", validation={"a": "~/a", "b": "b.jsonl"}, prompt_template="~$PLACE{prompt}")
    given.trainer = Namespace(default_root_dir="~/r", logger=False, callbacks=[callback])
    config = expand_paths(given)
    assert config.output_dir == f"{home}/o"
    assert (config.task_folder, config.selection) == (None, f"{home}/s")
    assert vars(config.model) == {
        "model_name_or_path": f"{home}/m",
        "selection": f"{home}/s",
        "warmup": Namespace(checkpoint=f"{home}/w"),
    }
    assert config.data.train == f"{home}/t"
    assert config.data.validation == {"a": f"{home}/a", "b": "b.jsonl"}
    assert config.data.prompt_template == "~$PLACE{prompt}"
    assert config.trainer.default_root_dir == f"{home}/r"
    assert config.trainer.callbacks[0].init_args == Namespace(dirpath=f"{home}/c", filename="~x")


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("data.validation", {"a": "x" * 300}, r"data\.validation\.a: The path x+\.\.\.x+ has a part of 300 bytes"),
        ("data.train", "a\0b", r"data\.train: The path a\\x00b holds a NUL character"),
        ("output_dir", "$NOWHERE/x", r"output_dir: The path \$NOWHERE/x names \$NOWHERE"),
        (
            "trainer.logger.save_dir",
            "/proc/x",
            r"/proc/x cannot be written \(.*\); choose another trainer\.logger",
        ),
    ],
)
def test_the_option_is_named(key: str, value: Any, problem: str) -> None:
    """A value that is no path, or nothing that can be written to, is refused by its key."""
    given = Namespace()
    given[key] = value
    with pytest.raises(UserError, match=problem):
        expand_paths(given)


def test_paths_of_several_sources(home: Path) -> None:
    """They are written out in lists and mappings, and a source's other options are not; a set may be called path."""
    sources = {"a": ["~/a", {"path": "$PLACE/b", "prompt_template": "~/{prompt}"}], "c": {"path": "~/c", "cap": 3}}
    given = Namespace(data=Namespace(train=sources, validation={"path": ["~/v"], "other": "~/w"}))
    config = expand_paths(given)
    changed = [f"{home}/a", {"path": f"{home}/b", "prompt_template": "~/{prompt}"}]
    assert config.data.train == {"a": changed, "c": {"path": f"{home}/c", "cap": 3}}
    assert config.data.validation == {"path": [f"{home}/v"], "other": f"{home}/w"}
    with pytest.raises(UserError, match=r"^data\.train\[1\]\.path: The path \$NOWHERE/x names \$NOWHERE"):
        expand_paths(Namespace(data=Namespace(train=["x", {"path": "$NOWHERE/x"}])))


def test_a_job_in_the_home_folder(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A configuration with shorthands is found by one, reads and writes there, and leaves nothing where it runs."""
    write_inputs(home)
    inputs = Inputs("~/model", "$PLACE/train.jsonl", "~/validation.jsonl")
    write_job(home, inputs, model={"model_name_or_path": "~/model", **SMALL}, data={"max_length": 48}, output_dir="~/s")
    run(["select", "--config=~/job.yaml", "--data.train=$PLACE/train.jsonl"])
    run(["allocate", "~/s", "--output_dir=$PLACE/t", "--model.data_budget", "2"])
    assert len(load_selection("~/t").example_ids) == 2
    assert str(home / "t") in capsys.readouterr().out
    assert list((home.parent / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("verb", ["select", "fit", "validate", "allocate", "export", "quickstart"])
def test_an_output_folder_that_cannot_be_written(
    verb: str, home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every verb says so before it reads data or weights."""
    (tmp_path / "file").touch()
    inputs = write_inputs(home)
    job = ["--config", str(write_job(home, inputs, model=SMALL))]
    if verb == "allocate":
        run(["select", *job, "--data.max_length", "48", "--output_dir", str(home / "s")])
    reads = []
    for place in ("data.module", "selection.reallocation"):
        monkeypatch.setattr(f"dualsft.{place}.read_records", lambda *a: reads.append(a))
    others = {
        "quickstart": [],
        "export": ["apply", "--base", inputs.model, "--delta", "d"],
        "allocate": [str(home / "s")],
    }
    arguments = others.get(verb, job)
    with pytest.raises(UserError, match=r"file/new cannot be written \(Not a directory\); choose another --output_dir"):
        run([verb, *arguments, "--output_dir", str(tmp_path / "file" / "new")])
    assert reads == []
