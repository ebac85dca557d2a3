"""Runs the commands of a job's steps: what `dualsft.commands.steps` starts as a process."""

import json
from functools import partial
from pathlib import Path

from dualsft.cli import run
from dualsft.commands.experiment_worker import alone, explain
from dualsft.commands.steps import error_file, log_file
from dualsft.experiments.workers import serve
from dualsft.storage.writing import write_atomically


def do(step: Path) -> None:
    """Run the command in a step's file; if it fails, say why in a file beside."""
    try:
        alone(partial(run, json.loads(step.read_text(encoding="utf-8"))))
    except Exception as error:
        write_atomically(error_file(step), explain(error))


if __name__ == "__main__":
    serve(do, log_file)
