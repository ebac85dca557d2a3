"""Peaks of memory beside those that `dualsft plan` predicts for the same batch."""

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from masked_fit import masked
from memory import Meter
from plan import COLD
from scoring import make_config

from dualsft.data.layout import Batch
from dualsft.errors import is_out_of_memory
from dualsft.matrix.passes import gradient_pass
from dualsft.models.loading import checkpoint_activations
from dualsft.plans.job import DataSizes, FitJob, Machine, SelectJob, Trained
from dualsft.plans.passes import Running
from dualsft.plans.scoring import plan_select
from dualsft.plans.shape import ModelShape
from dualsft.plans.training import plan_fit
from dualsft.selection.passes import scoring_mode
from dualsft.selection.settings import SelectionSettings
from gpu_checks.models import build, full_batches, release, small_direction
from gpu_checks.section import Figure, Scale

_GRADIENT, _SCORES, _FIT = "validation gradient", "scores", "training"


def peaks(scale: Scale) -> Iterator[Figure]:
    """Planned and measured peaks of three phases, activations recomputed, half of the tokens supervised."""
    for shape in dict.fromkeys(scale.shapes):
        plan = _planned(scale, shape)
        for phase, work in _WORK.items():
            yield Figure(f"{shape}, {phase}: planned", plan[phase] / 2**30, "GiB")
            measured = _measured(scale, shape, work)
            if isinstance(measured, str):
                yield Figure(f"{shape}, {phase}: measured", measured)
            else:
                yield Figure(f"{shape}, {phase}: measured", measured / 2**30, "GiB")
                if measured:
                    yield Figure(f"{shape}, {phase}: planned / measured", plan[phase] / measured, "ratio")


def _planned(scale: Scale, shape: str) -> dict[str, int]:
    length = scale.lengths[1]
    with TemporaryDirectory() as folder:
        make_config(shape).save_pretrained(folder)
        common: dict[str, Any] = {
            "shape": ModelShape(Path(folder), "bfloat16"),
            "machine": Machine(scale.device),
            "data": DataSizes(scale.batch_tokens, length, max(1, scale.batch_tokens // length), supervised=0.5),
            "running": Running(checkpointing=True),
        }
        settings = SelectionSettings(preconditioner="none", warmup=COLD, step_size=1e-5)
        phases = [*plan_select(SelectJob(**common, settings=settings)).phases]
        phases += plan_fit(FitJob(**common, trained=Trained(0.1))).phases
    return {phase.name: phase.peak for phase in phases}


def _gradient(model: Any, batches: list[Batch]) -> None:
    with scoring_mode(model, checkpointing=True):
        gradient_pass(model, lambda first: batches[first:])


def _score(model: Any, batches: list[Batch]) -> None:
    u = small_direction(model)
    with scoring_mode(model, checkpointing=True):
        gradient_pass(model, lambda first: batches[first:], directions=[u])


def _train(model: Any, batches: list[Batch]) -> None:
    checkpoint_activations(model.train())
    training = masked(model, "scattered", 0.1)
    release(model.device.type)
    for batch in batches:
        training.step(batch)


_WORK: dict[str, Callable[[Any, list[Batch]], None]] = {_GRADIENT: _gradient, _SCORES: _score, _FIT: _train}


def _measured(scale: Scale, shape: str, work: Callable[[Any, list[Batch]], None]) -> int | str:
    """The peak above what was held before, or what memory ran out of."""
    release(scale.device)
    meter = Meter(scale.device)
    try:
        model = build(shape, scale.device)
        batches = full_batches(model, scale.batch_tokens, scale.lengths[1], 2)
        meter.restart()
        work(model, batches)
        return meter.peak()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return "out of memory"
