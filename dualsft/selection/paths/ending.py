"""Where a path ends: on the target, where the part of the validation set that it is not trained on gains most.

A few dozen examples can be learnt by heart. Training until their own loss is lowest would score the pool by what
helps to remember them; the held-out part has a loss that falls only while a skill is learnt.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from dualsft.data.module import InstructionDataModule
from dualsft.data.packing import Ids
from dualsft.errors import UserError
from dualsft.models import PreTrainedModel
from dualsft.runs.folder import RunFolder
from dualsft.runs.progress import PhaseLog, say
from dualsft.selection.passes import Passes
from dualsft.selection.paths.integral import PathIntegrator, Side
from dualsft.selection.paths.walk import RecordedPath, Trained, pool_training, target_training, walk
from dualsft.selection.settings import SelectionSettings

LITTLE = 0.1
"""Share of the held-out loss below which a path is said to have taught little."""


@dataclass(frozen=True)
class EndedPath:
    """A path, up to the point at which it ends.

    Attributes:
        path: Its points.
        walked_steps: How many steps were walked.
        integrator: Integrates along it.
        held_out: The mean loss of the held-out part at each point that was walked; empty without such a part.
    """

    path: RecordedPath
    walked_steps: int
    integrator: PathIntegrator
    held_out: list[float] = field(default_factory=list)

    def describe(self) -> dict[str, Any]:
        """The manifest's entry on its points, and on why it ends there."""
        return {"steps": self.path.steps, "walked_steps": self.walked_steps, "held_out_losses": self.held_out}


def walk_paths(
    model: PreTrainedModel,
    settings: SelectionSettings,
    data: InstructionDataModule,
    passes: Passes,
    run: RunFolder,
    log: PhaseLog,
    seed: int,
) -> dict[str, EndedPath]:
    """Walk the path of each validation set from where the model is: one of its own, or the warm-up's for all."""

    def integrator(path: RecordedPath, trained: Trained) -> PathIntegrator:
        return PathIntegrator(model, settings, passes, run, log, path, trained.title)

    if settings.path_rule.trains_on == "pool":
        trained = pool_training(settings, data, seed)
        path = walk(model, settings, trained, run, log, seed)
        ended = EndedPath(path, path.steps[-1], integrator(path, trained))
        return dict.fromkeys(data.validation_sets, ended)
    paths: dict[str, EndedPath] = {}
    for name, examples in data.validation_sets.items():
        if paths:  # every path starts at θ_0
            next(iter(paths.values())).path.move(model, 0)
        held_out, trained_on = split(examples.ok_ids(), settings.path.held_out, seed)
        if settings.path.held_out and not held_out:
            say(
                f"the validation set {name} is too small to hold a part of it out ({len(trained_on)} examples): the "
                "path goes to its last step, whatever it learns by heart; give more, or fewer model.path.epochs."
            )
        trained = target_training(settings, data, name, trained_on, seed)
        path = walk(model, settings, trained, run, log, seed)
        walked, losses = path.steps[-1], list[float]()
        if held_out:
            losses = held_out_losses(integrator(path, trained), path, validation_side(data, name, held_out, "held-out"))
            path = path.until(ending(losses, name))
        paths[name] = EndedPath(path, walked, integrator(path, trained), losses)
    return paths


def validation_side(data: InstructionDataModule, name: str, ids: Ids, what: str = "validation") -> Side:
    """Some examples of a validation set, to pass over."""
    named = f"{what} {name}" if data.named_validation else what
    return Side(named, partial(_loader, data, name), np.asarray(ids, np.int64))


def _loader(data: InstructionDataModule, name: str, ids: Any, start: int, tokens: int, part: slice) -> Any:
    return data.validation_loader(name, start, tokens, part, ids)


def held_out_losses(integrator: PathIntegrator, path: RecordedPath, side: Side) -> list[float]:
    """The mean loss of the examples at each point; those that are not finite at every one are left out."""
    at_points = [integrator.losses(side, point)[0] for point in range(path.pieces + 1)]
    if not (common := set.intersection(*map(set, at_points))):
        raise UserError(f"No {side.name} example has a finite loss all along the path; check the data.")
    return [math.fsum(losses[i] for i in common) / len(common) for losses in at_points]


def split(ids: list[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """A share of the ids at random, and the others; each in order, and neither all of them."""
    count = min(round(share * len(ids)), len(ids) - 1)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed)).tolist()
    apart = {ids[k] for k in order[:count]}
    return [i for i in ids if i in apart], [i for i in ids if i not in apart]


def ending(losses: list[float], name: str) -> int:
    """The point with the lowest loss.

    Raises:
        UserError: if that is the first: then the path leads nowhere.
    """
    end = min(range(len(losses)), key=lambda k: losses[k])
    if end == 0:
        raise UserError(
            f"The path along the validation set {name} does not lower the loss of its held-out part ({losses[0]:.4g} "
            f"at the start, {min(losses[1:]):.4g} at best): lower model.path.learning_rate, give more validation "
            "examples, or set model.path.held_out to 0."
        )
    if (gain := 1 - losses[end] / losses[0]) < LITTLE:
        say(
            f"training on the validation set {name} lowers the loss of its held-out part by {gain:.0%} alone "
            f"({losses[0]:.4g} to {losses[end]:.4g}): so little is learnt that the scores along the path say little; "
            "compare them with those at one checkpoint, without model.path.along."
        )
    return end
