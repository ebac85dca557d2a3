"""Loggers by short names, which write under a run's output folder, and what a run without training tells them."""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualsft.errors import UserError, first_line
from dualsft.storage.writing import writing_to

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

LOGS = "logs"
"""The part of an output folder that loggers write to."""


def make_loggers(given: Any, folder: Path | None, csv: Callable[[Path], "Logger"] | None = None) -> list["Logger"]:
    """The loggers that an option gives: names are made into loggers that write under a folder, others stay.

    Args:
        given: A logger, a short name of one, several of either, or a truth value; true means ``csv``.
        folder: The run's output folder.
        csv: Makes the logger ``csv``, if it is not Lightning's.

    Raises:
        UserError: If a name is none, its package is not installed, or there is no folder to write to.
    """
    made = {"csv": csv or _csv, "tensorboard": _tensorboard, "wandb": _wandb}
    if given is None or given is False:
        return []
    parts = ["csv"] if given is True else [given] if isinstance(given, str) else given
    return [_made(part, folder, made) for part in (parts if isinstance(parts, Iterable) else [parts])]


def _made(part: Any, folder: Path | None, known: Mapping[str, Callable[[Path], "Logger"]]) -> "Logger":
    if not isinstance(part, str):
        return part
    if part not in known:
        raise UserError(
            f"trainer.logger is {part!r}; give {', '.join(known)} or a list of these, or a class of Lightning's by "
            "class_path and init_args."
        )
    if folder is None:
        raise UserError(f"trainer.logger {part} writes to the output folder, which is not given; give --output_dir.")
    try:
        return known[part](folder)
    except ModuleNotFoundError as error:
        raise UserError(
            f"trainer.logger {part} needs a package that is not installed ({first_line(error)}); install it with "
            f"`pip install {part}`."
        ) from error


def _csv(folder: Path) -> "Logger":
    from lightning.pytorch.loggers import CSVLogger

    return CSVLogger(folder, name=LOGS, version=0)


def _tensorboard(folder: Path) -> "Logger":
    from lightning.pytorch.loggers import TensorBoardLogger

    return TensorBoardLogger(folder, name=LOGS, version="tensorboard", default_hp_metric=False)


def _wandb(folder: Path) -> "Logger":
    from lightning.pytorch.loggers import WandbLogger

    project = os.environ.get("WANDB_PROJECT", "dualsft")
    return WandbLogger(name=folder.name, save_dir=folder / LOGS, project=project)


def log_results(
    loggers: Iterable["Logger"], folder: Path | None, settings: Mapping[str, Any], metrics: Mapping[str, float]
) -> None:
    """Log a run that trains nothing: its settings as hyperparameters, and what it found as step 0.

    Args:
        loggers: Where to.
        folder: The run's output folder, which exists by now.
        settings: The run's configuration.
        metrics: Name -> number.
    """
    for logger in loggers:
        with writing_to(folder / LOGS if folder else Path()):
            if folder:
                (folder / LOGS).mkdir(exist_ok=True)
            logger.log_hyperparams(dict(settings))
            logger.log_metrics(dict(metrics), step=0)
            logger.save()
            logger.finalize("success")
