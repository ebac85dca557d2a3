"""Configurations of select, fit and validate: options of wrong types, unknown ones, and odd values; then the job."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from dualsft.cli import run
from tests.fuzz.changes import changed, changed_bytes
from tests.fuzz.harness import Fuzzer
from tests.world.jobs import Inputs, write_inputs

SECONDS = 30
"""How long a job may take; what is at work for longer counts as having ended well."""


@cache
def _world() -> tuple[TemporaryDirectory[str], Inputs]:
    folder = TemporaryDirectory()
    return folder, write_inputs(Path(folder.name), hidden_size=8, intermediate_size=8, num_hidden_layers=1)


def _sound(inputs: Inputs) -> dict[str, Any]:
    """A configuration of all three verbs, with options of every type."""
    return {
        "seed_everything": 0,
        "model": {
            "model_name_or_path": inputs.model,
            "dtype": "float32",
            "scorer": {"class_path": "diagonal_fisher"},
            "preconditioner": "adam",
            "warmup": {"fraction": 0.5, "epochs": 1, "learning_rate": 1e-3},
            "step_size": "auto",
            "parameter_budget": 0.1,
            "data_budget": 3,
            "data_allocator": {"class_path": "top_k"},
            "trainable": [".*"],
            "frozen": ["norm"],
            "samples": {"number": 1, "max_new_tokens": 2},
            "generation": {"max_new_tokens": 2},
        },
        "data": {
            "train": inputs.train,
            "validation": {"first": inputs.validation},
            "max_length": 32,
            "batch_tokens": 64,
            "batch_size": 2,
            "packing": False,
            "prompt_template": "{prompt}\n",
        },
        "optimizer": {"class_path": "AdamW", "init_args": {"lr": 1e-3}},
        "lr_scheduler": {"class_path": "ConstantLR", "init_args": {"factor": 1.0}},
        "trainer": {"accelerator": "cpu", "max_epochs": 1, "enable_progress_bar": False, "gradient_clip_val": 1.0},
    }


@st.composite
def _cases(draw: DrawFn) -> tuple[str, bytes]:
    sound = _sound(_world()[1])
    verb = draw(st.sampled_from(["select", "fit", "validate"]))
    if draw(st.integers(0, 7)) == 0:
        return verb, draw(changed_bytes(yaml.safe_dump(sound).encode()))
    return verb, yaml.safe_dump(draw(changed(sound, most=2))).encode()


def _run(case: tuple[str, bytes], folder: Path) -> None:
    verb, data = case
    path = folder / "job.yaml"
    path.write_bytes(data)
    with suppress(_StillAtWork), _stopped_after(SECONDS):
        run([verb, "--config", str(path), "--output_dir", str(folder / "out")])


class _StillAtWork(BaseException):
    """A job does what it was asked to: a million epochs are no mistake."""


@contextmanager
def _stopped_after(seconds: int) -> Iterator[None]:
    """Stop what takes longer, where the system has alarms."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(*_: object) -> None:
        raise _StillAtWork

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


CONFIGS = Fuzzer(_cases(), _run, _world)
