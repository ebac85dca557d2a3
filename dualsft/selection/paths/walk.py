"""Walks a path once, and keeps the weights at its points in files, from which each piece is scored.

Beside the model, its optimizer's state while it trains, and a batch, nothing of the path is held in memory.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dualsft.data.module import InstructionDataModule
from dualsft.errors import UserError, advising, blaming
from dualsft.matrix.nonfinite import all_finite
from dualsft.models import PreTrainedModel
from dualsft.models.dtypes import accumulator_dtype
from dualsft.models.lazy import LazyTensors, under
from dualsft.paths import ScoringPath
from dualsft.runs.folder import RunFolder
from dualsft.runs.phase_keeper import PhaseKeeper
from dualsft.runs.progress import PhaseLog
from dualsft.selection.dense_training import DenseTraining, TrainingNames
from dualsft.selection.directions import trainable_parameters
from dualsft.selection.paths.advance import PathAdvance
from dualsft.selection.paths.settings import EPOCHS
from dualsft.selection.settings import SelectionSettings
from dualsft.sharding.collectives import any_rank
from dualsft.sharding.local_batch import rows_to_read
from dualsft.sharding.shards import local_shard

ADVICE = (
    "beside the model and a batch it takes 16 bytes for each weight: set model.offload_optimizer to always, which "
    "holds those on the host, or model.gradient_checkpointing, and go on with --resume, or start anew (--overwrite) "
    "with a lower data.batch_tokens or data.batch_size, or with model.path.optimizer sgd"
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

    def weights(self, point: int) -> Mapping[str, Tensor]:
        """θ_k by parameter name, on the host, each read from its file at every use."""
        return self._part("weight", point)

    def second_moment(self, point: int) -> Mapping[str, Tensor]:
        """ĉ there by parameter name, if the path was walked with Adam."""
        return self._part("moment", point)

    def _part(self, part: str, point: int) -> Mapping[str, Tensor]:
        saved = self._run.load(_point(self._key, point))
        assert saved is not None
        return under(part, saved[0])

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

    def displacement(self, model: PreTrainedModel, shares: Iterable[tuple[int, float]]) -> LazyTensors:
        """Σ_k w_k (θ_k − θ_{k+1}) of some pieces k with weights w_k, by trainable parameter, on the model's device.

        Each tensor is made when it is read.
        """
        trainable = trainable_parameters(model)
        ends = [(self.weights(k), self.weights(k + 1), weight) for k, weight in shares]

        def total(name: str) -> Tensor:
            parameter = trainable[name]
            wide, device = accumulator_dtype(parameter), local_shard(parameter.detach()).device
            parts = [(a[name].to(device, wide) - b[name].to(device, wide)) * weight for a, b, weight in ends]
            return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

        return LazyTensors(trainable, total)


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
        data.training_loader(ids, seed, name, rows_to_read()),
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
        data.training_loader(ids, seed, part=rows_to_read()),
        len(ids),
        path.epochs or warmup.epochs,
        path.learning_rate or warmup.learning_rate,
        "remove them from data.train, or lower model.path.learning_rate",
    )


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
    _drop_damaged(run, key)
    if (saved := run.load(done)) is not None:
        log.restore(saved[1])
        PhaseKeeper(run, key, settings.save_minutes).drop()
        return RecordedPath(run, key, saved[1]["steps"], trained.learning_rate)
    keeper = PhaseKeeper(run, key, settings.save_minutes)
    if not keeper.earlier:
        keeper.drop()
        _drop_points_of_other_ranks(run, key)
    advance = _advance(model, settings, trained, keeper, seed)
    points: list[int] = []
    try:
        with (
            advising(f"in the {trained.title}", ADVICE),
            log.phase(trained.title, trained.examples * trained.epochs, keeper.earlier, dealt=False) as keeper.meter,
        ):
            for _ in _points(path, advance):
                _check_finite(path, model, len(points))
                moments = _second_moment(path, advance, settings) if points else {}
                _keep_point(run, _point(key, len(points)), model, moments)
                points.append(advance.goal)
    finally:
        advance.close()
    recorded = RecordedPath(run, key, points, trained.learning_rate)
    _check_walk(path, recorded)
    run.save(done, {}, {"steps": points, **log.latest()})
    keeper.drop()
    return recorded


def _advance(
    model: PreTrainedModel, settings: SelectionSettings, trained: Trained, keeper: PhaseKeeper, seed: int
) -> PathAdvance:
    """The training that the walk advances, from the step that an earlier run took last."""
    ends = settings.path.ends(trained.steps)
    names = TrainingNames(trained.title, trained.remedy, ADVICE)
    return PathAdvance(
        model,
        trained.epochs,
        trained.steps,
        stretches=[b - a for a, b in zip([0, *ends], ends, strict=False)],
        start=lambda: DenseTraining(
            model, trained.learning_rate, seed, names, settings.path.optimizer, settings.offload_optimizer
        ),
        take=lambda training: training.steps(trained.batches, trained.epochs, keeper.meter or iter, keeper),
        taken=keeper.earlier.get("taken", 0),
    )


def _points(path: ScoringPath, advance: PathAdvance) -> Iterator[None]:
    """The points of a rule's walk; a failure of the walk is blamed on the rule."""
    with blaming(path, "walk"):
        yield from path.walk(advance) or ()  # a walk that yields nowhere returns None


def _check_finite(path: ScoringPath, model: PreTrainedModel, point: int) -> None:
    """Refuse a point with weights that are not finite."""
    shards = [local_shard(parameter.detach()) for parameter in model.parameters()]
    if any_rank(not all(all_finite(shard) for shard in shards if shard.numel())):
        raise UserError(
            f"The path of {type(path).__name__} comes to weights that are not finite at point {point}; lower "
            "model.path.learning_rate, or mend its walk."
        )


def _check_walk(path: ScoringPath, recorded: RecordedPath) -> None:
    """Refuse a walk that yields no two points, or along which everything scores zero."""
    name, count = type(path).__name__, len(recorded.steps)
    if count < 2:
        raise UserError(
            f"{name}.walk yields at {count} point{'' if count == 1 else 's'}; a path has two or more, its start among "
            "them; mend it."
        )
    if path.is_complete:
        first, last = recorded.weights(0), recorded.weights(recorded.pieces)
        if not any_rank(any(not torch.equal(first[n], last[n]) for n in first)):
            raise UserError(
                f"The path of {name} ends at the weights that it starts from, so every score along it is zero; raise "
                "model.path.learning_rate, or mend its walk."
            )


def _second_moment(path: ScoringPath, advance: PathAdvance, settings: SelectionSettings) -> Mapping[str, Tensor]:
    """Adam's second moment at the end of a piece, if it will be used."""
    if not (path.needs and settings.needs_second_moment):
        return {}
    if not advance.goal:
        raise UserError(
            f"{type(path).__name__} needs Adam's second moment, but its walk comes to a point without any training; "
            "set model.preconditioner to none, with a scorer that does without."
        )
    return advance.second_moment()


def _drop_damaged(run: RunFolder, key: str) -> None:
    """Read every point that an earlier run kept: a damaged one is dropped now, with all states that rest on it."""
    point = 0
    while run.load(_point(key, point)) is not None:
        point += 1


def _drop_points_of_other_ranks(run: RunFolder, key: str) -> None:
    """Drop the points that another number of ranks has kept, of a walk that begins again: it rounds otherwise."""
    point = 0
    while run.load(_point(key, point)) is not None:
        if run.load_own(_point(key, point)) is None:
            run.drop(_point(key, point))
        point += 1


def _keep_point(run: RunFolder, name: str, model: PreTrainedModel, moments: Mapping[str, Tensor]) -> None:
    """Save the model's weights and these second moments, unless an earlier run has."""
    if run.load(name) is not None:
        return
    weights = {name: local_shard(parameter.detach()) for name, parameter in model.named_parameters()}

    def make(key: str) -> Tensor:
        part, _, of = key.partition(":")
        return weights[of] if part == "weight" else moments[of]

    run.save(name, LazyTensors([f"weight:{n}" for n in weights] + [f"moment:{n}" for n in moments], make), {})
