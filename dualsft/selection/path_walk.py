"""Walks a path once, and keeps the weights at its points in files, from which each piece is scored.

Beside the model, its optimizer's state while it trains, and a batch, nothing of the path is held in memory.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dualsft.data.module import InstructionDataModule
from dualsft.errors import UserError, advising, blaming
from dualsft.models import PreTrainedModel
from dualsft.models.dtypes import accumulator_dtype
from dualsft.models.lazy import LazyTensors
from dualsft.runs.folder import RunFolder
from dualsft.runs.phase_store import PhaseKeeper
from dualsft.runs.progress import PhaseLog
from dualsft.selection.dense_training import DenseTraining, TrainingNames
from dualsft.selection.directions import trainable_parameters
from dualsft.selection.path_settings import EPOCHS
from dualsft.selection.settings import SelectionSettings
from dualsft.sharding.shards import local_shard

ADVICE = (
    "beside the model and a batch it takes 16 bytes for each weight: set model.gradient_checkpointing and go on with "
    "--resume, or start anew (--overwrite) with a lower data.batch_tokens or data.batch_size, or with "
    "model.path.optimizer sgd"
)


class RecordedPath:
    """The points of a path, in the files of a run.

    Args:
        run: Where they are.
        key: Their name in it.
        steps: Steps of training that had been taken at each point, the first included.
        learning_rate: The training's.
    """

    def __init__(self, run: RunFolder, key: str, steps: Sequence[int], learning_rate: float) -> None:
        self._run, self._key = run, key
        self.steps, self.learning_rate = list(steps), learning_rate

    @property
    def pieces(self) -> int:
        """The number of pieces, each from one point to the next."""
        return len(self.steps) - 1

    def until(self, point: int) -> "RecordedPath":
        """The part of the path up to a point."""
        return RecordedPath(self._run, self._key, self.steps[: point + 1], self.learning_rate)

    def weights(self, point: int) -> dict[str, Tensor]:
        """θ_k by parameter name, on the host, each read from its file when it is first used."""
        return self._part("weight", point)

    def second_moment(self, point: int) -> dict[str, Tensor]:
        """ĉ there by parameter name, if the path was walked with Adam."""
        return self._part("moment", point)

    def _part(self, part: str, point: int) -> dict[str, Tensor]:
        saved = self._run.load(_point(self._key, point))
        assert saved is not None
        return {n.removeprefix(f"{part}:"): t for n, t in saved[0].items() if n.startswith(f"{part}:")}

    @torch.no_grad()
    def move(self, model: PreTrainedModel, position: float) -> None:
        """Bring the model to a position: k + t is a share t of the straight line from θ_k to θ_{k+1}."""
        point = min(int(position), self.pieces)
        share, before = position - point, self.weights(point)
        after = self.weights(point + 1) if share else before
        for name, parameter in model.named_parameters():
            place, wide = before[name], accumulator_dtype(parameter)
            if share:
                place = place.to(wide).lerp(after[name].to(wide), share)
            local_shard(parameter.detach()).copy_(place)

    def displacement(self, model: PreTrainedModel, shares: Iterable[tuple[int, float]]) -> dict[str, Tensor]:
        """Σ_k w_k (θ_k − θ_{k+1}) of some pieces k with weights w_k, by trainable parameter, on the model's device."""
        ends = [(self.weights(k), self.weights(k + 1), weight) for k, weight in shares]

        def total(name: str, parameter: Tensor) -> Tensor:
            wide, device = accumulator_dtype(parameter), local_shard(parameter.detach()).device
            parts = [(a[name].to(device, wide) - b[name].to(device, wide)) * weight for a, b, weight in ends]
            return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

        return {name: total(name, parameter) for name, parameter in trainable_parameters(model).items()}


def _point(key: str, point: int) -> str:
    return f"{key}-point-{point}"


@dataclass(frozen=True)
class Trained:
    """What a path trains on.

    Attributes:
        key: The path's name in the run's files.
        title: Its name in the log.
        batches: Re-iterable training batches.
        examples: How many examples those are.
        epochs: Passes over them.
        learning_rate: Constant.
        remedy: What can be done where a loss is not finite.
    """

    key: str
    title: str
    batches: Any
    examples: int
    epochs: int
    learning_rate: float
    remedy: str

    @property
    def steps(self) -> int:
        """Optimizer steps of all epochs."""
        return len(self.batches) * self.epochs


def target_training(
    settings: SelectionSettings, data: InstructionDataModule, name: str, ids: Sequence[int], seed: int
) -> Trained:
    """Training on some examples of a validation set."""
    path, of = settings.path, f" to {name}" if data.named_validation else ""
    return Trained(
        f"path-{name}",
        f"path{of}",
        data.training_loader(ids, seed, name),
        len(ids),
        path.epochs or EPOCHS,
        path.learning_rate or settings.warmup.learning_rate,
        "remove them from data.validation, or lower model.path.learning_rate",
    )


def pool_training(settings: SelectionSettings, data: InstructionDataModule, seed: int) -> Trained:
    """Training on the warm-up's share of the pool."""
    path, warmup = settings.path, settings.warmup
    ids = warmup.draw(data.train_examples.ok_ids(), seed)
    return Trained(
        "path-pool",
        "path along the pool",
        data.training_loader(ids, seed),
        len(ids),
        path.epochs or warmup.epochs,
        path.learning_rate or warmup.learning_rate,
        "remove them from data.train, or lower model.path.learning_rate",
    )


class _Advance:
    """A `dualsft.paths.PathTraining` over the steps of `DenseTraining`; those that an earlier run took are skipped."""

    def __init__(self, model: PreTrainedModel, stretches: Sequence[int], steps: Iterator[int], taken: int) -> None:
        self.model: nn.Module = model
        self.stretches, self.steps = stretches, sum(stretches)
        self._iterator, self._taken = steps, taken
        self.goal = 0

    def train(self, steps: int) -> None:
        """Take so many optimizer steps."""
        self.goal += steps
        while self._taken < self.goal:
            taken = next(self._iterator, None)
            if taken is None:
                raise UserError(
                    f"The path asks for step {self.goal}, but model.path.epochs gives {self._taken}; raise it."
                )
            self._taken = taken


def walk(
    model: PreTrainedModel,
    settings: SelectionSettings,
    trained: Trained,
    run: RunFolder,
    log: PhaseLog,
    seed: int,
) -> RecordedPath:
    """Walk a path from where the model is, unless an earlier run has; the model is left anywhere on it.

    Raises:
        UserError: if a loss stops being finite, memory runs out, or the path's rule makes a mistake.
    """
    path, key, done = settings.path.along, trained.key, f"{trained.key}-walked"
    assert path is not None
    if (saved := run.load(done)) is not None:
        log.restore(saved[1])
        PhaseKeeper(run, key, settings.save_minutes).drop()
        return RecordedPath(run, key, saved[1]["steps"], trained.learning_rate)
    ends = settings.path.ends(trained.steps)
    stretches = [b - a for a, b in zip([0, *ends], ends, strict=False)]
    keeper = PhaseKeeper(run, key, settings.save_minutes)
    names = TrainingNames(trained.title, trained.remedy, ADVICE)
    training = DenseTraining(model, trained.learning_rate, seed, names, settings.path.optimizer)
    points: list[int] = []
    try:
        with (
            advising(f"in the {trained.title}", ADVICE),
            log.phase(trained.title, trained.examples * trained.epochs, keeper.earlier, dealt=False) as keeper.meter,
        ):
            steps = training.steps(trained.batches, trained.epochs, keeper.meter, keeper)
            advance = _Advance(model, stretches, steps, keeper.earlier.get("taken", 0))
            with blaming(path, "walk"):
                for _ in path.walk(advance):
                    _keep_point(run, _point(key, len(points)), model, training, settings)
                    points.append(advance.goal)
    finally:
        training.close()
    if len(points) < 2:
        raise UserError(f"{type(path).__name__}.walk yields {len(points)} points; a path has two or more; mend it.")
    run.save(done, {}, {"steps": points, **log.latest()})
    keeper.drop()
    return RecordedPath(run, key, points, trained.learning_rate)


def _keep_point(
    run: RunFolder, name: str, model: PreTrainedModel, training: DenseTraining, settings: SelectionSettings
) -> None:
    """Save the model's weights, and Adam's second moment if it will be used, unless an earlier run has."""
    if run.load(name) is not None:
        return
    weights = {name: local_shard(parameter.detach()) for name, parameter in model.named_parameters()}
    assert settings.path.along is not None
    with_moments = settings.path.along.needs and settings.needs_second_moment
    moments = training.second_moment() if with_moments else {}

    def make(key: str) -> Tensor:
        part, _, of = key.partition(":")
        return weights[of] if part == "weight" else moments[of]

    run.save(name, LazyTensors([f"weight:{n}" for n in weights] + [f"moment:{n}" for n in moments], make), {})
