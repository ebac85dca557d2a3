"""Paths that somebody else wrote: through checkpoints on disk, at odd points, and with mistakes, each told in words."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dualsft import PathTraining, Piece, PieceRows, ScoringPath
from dualsft.errors import UserError
from dualsft.models.loading import load_model
from dualsft.paths import TargetPath
from dualsft.selection import Selection, Warmup
from dualsft.selection.paths.settings import PathSettings
from tests.references import gradient_loop, inner
from tests.selection.test_paths import WALK, losses, path_select, weights_of
from tests.world.data import LINES, VALIDATION
from tests.world.faults import kill_often
from tests.world.jobs import ADAM, Inputs, contents, select, write_inputs


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A float64 model with a pool and two dozen validation rows."""
    return write_inputs(tmp_path_factory.mktemp("exact"), LINES, VALIDATION * 2, dtype=torch.float64)


@pytest.fixture(scope="module")
def checkpoints(exact: Inputs, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two checkpoints of the model: half of a step down the slope of the first example's loss, and the whole step."""
    model = load_model(exact.model, "float64")
    (gradient,) = gradient_loop(model, [exact.examples("train")[0]])
    folders = []
    for k in range(2):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.sub_(gradient[name], alpha=0.02)
        folders.append(str(tmp_path_factory.mktemp("checkpoint") / str(k)))
        shutil.copytree(exact.model, folders[-1])  # with the tokenizer
        model.save_pretrained(folders[-1])
    return folders


class Through(ScoringPath):
    """Through checkpoints, which it loads."""

    def __init__(self, folders: list[str]) -> None:
        self.folders = folders

    def walk(self, training: PathTraining) -> Iterator[None]:
        """The model as it is, and each checkpoint."""
        yield
        for folder in self.folders:
            training.load(folder)
            yield


def test_a_path_through_checkpoints(exact: Inputs, checkpoints: list[str], tmp_path: Path) -> None:
    """No step is trained; examples score by the fall of their losses from the first to the last, weights by theirs."""
    path = replace(WALK, along=Through(checkpoints), normalize="none", columns="pool", tolerance=1e-3)
    found = path_select(exact, tmp_path / "out", path)
    ends = [load_model(folder, "float64") for folder in (exact.model, checkpoints[-1])]
    before, after = (losses(exact, model, weights_of(model)) for model in ends)
    scores = found.examples["score"].to_pylist()
    assert before[0] - after[0] > 0.01
    assert {i: scores[i] for i in before} == pytest.approx({i: before[i] - after[i] for i in before}, abs=2e-3)
    told = found.manifest["path_walked"]["validation"]
    assert (told["steps"], told["walked_steps"]) == ([0, 0, 0], 0)
    assert told["pool"]["reached"]
    alone = path_select(exact, tmp_path / "data", replace(path, columns="target"), order="data")
    scores = alone.examples["score"].to_pylist()
    assert {i: scores[i] for i in before} == pytest.approx({i: before[i] - after[i] for i in before}, rel=1e-9)


def test_checkpoints_end_where_the_held_out_part_gains_most(
    exact: Inputs, checkpoints: list[str], tmp_path: Path
) -> None:
    """As any path: a later checkpoint that has lost it counts for nothing."""
    ruined = load_model(checkpoints[0], "float64")
    with torch.no_grad():
        for parameter in ruined.parameters():
            parameter.mul_(3)
    ruined.save_pretrained(tmp_path / "ruined")
    model, slope = load_model(exact.model, "float64"), _slope(exact)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.sub_(slope[name], alpha=0.02)
    model.save_pretrained(tmp_path / "better")
    folders = [str(tmp_path / "better"), str(tmp_path / "ruined")]
    path = replace(WALK, along=Through(folders), held_out=0.25)
    told = path_select(exact, tmp_path / "out", path).manifest["path_walked"]
    held_out = told["validation"]["held_out_losses"]
    assert held_out.index(min(held_out)) == 1
    assert told["validation"]["steps"] == [0, 0]


def _slope(exact: Inputs) -> dict[str, Tensor]:
    """The mean gradient over the validation set."""
    model = load_model(exact.model, "float64")
    gradients = gradient_loop(model, exact.examples("validation").values())
    return {n: torch.stack([g[n] for g in gradients]).mean(0) for n in gradients[0]}


def finite_scores(selection: Selection) -> list[float]:
    """The scores of the examples that have one."""
    return [score for score in selection.examples["score"].to_pylist() if score is not None]


class Warm(ScoringPath):
    """Trains on from a checkpoint."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def walk(self, training: PathTraining) -> Iterator[None]:
        """From the checkpoint, by one epoch after another."""
        training.load(self.folder)
        yield
        for _ in range(training.epochs):
            training.train(training.steps // training.epochs)
            yield


def test_a_path_may_start_at_a_checkpoint(exact: Inputs, checkpoints: list[str], tmp_path: Path) -> None:
    """It trains from there: the scores are those of the usual path with this model as its base."""
    found = path_select(exact, tmp_path / "out", replace(WALK, along=Warm(checkpoints[0])))
    there = replace(exact, model=checkpoints[0])
    expected = path_select(there, tmp_path / "there", replace(WALK, along=TargetPath(), pieces=2))
    assert finite_scores(found) == pytest.approx(finite_scores(expected), rel=1e-9)
    assert found.manifest["path_walked"]["validation"]["steps"][1] > 0


@pytest.mark.slow
def test_a_killed_walk_from_a_checkpoint_goes_on_to_the_same_bytes(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started again it loads the checkpoint once more, and trains on from where it was."""
    model = load_model(inputs.model)
    with torch.no_grad():
        next(model.parameters()).mul_(1.1)
    model.save_pretrained(tmp_path / "checkpoint")
    path = replace(WALK, along=Warm(str(tmp_path / "checkpoint")))
    options: dict[str, Any] = {"path": path, "save_minutes": 1e-9, "order": "data"}
    expected = contents(select(inputs, tmp_path / "unbroken", options).folder)
    assert kill_often(inputs, tmp_path / "killed", options, monkeypatch, every=2) > 3
    assert contents(tmp_path / "killed") == expected


class Cosines(ScoringPath):
    """The cosine with the validation gradient, of plain gradients, at the model as it is: a path of no length."""

    needs = ("statistics",)
    needs_of_examples = ("gradient_norm",)

    def walk(self, training: PathTraining) -> Iterator[None]:
        """Stays."""
        yield
        yield

    def direction(self, piece: Piece) -> Tensor:
        """The validation gradient."""
        assert piece.statistics is not None
        return piece.statistics.validation_gradient

    def contribution(self, rows: PieceRows) -> Tensor:
        """The cosine."""
        assert rows.validation_norm is not None
        assert rows.gradient_norm is not None
        return rows.score / (rows.validation_norm * rows.gradient_norm)


def test_a_path_that_never_trains(exact: Inputs, tmp_path: Path) -> None:
    """Its one piece is scored where the model is; Adam's second moment, which it cannot have, is refused."""
    path = replace(WALK, along=Cosines())
    options = {"preconditioner": "none", "warmup": Warmup(fraction=0.0)}
    found = path_select(exact, tmp_path / "out", path, **options)
    model = load_model(exact.model, "float64")
    v, examples = _slope(exact), exact.examples("train")
    gradients = gradient_loop(model, examples.values())
    scores = found.examples["score"].to_pylist()
    for i, g in zip(examples, gradients, strict=True):
        assert scores[i] == pytest.approx(inner(v, g) / (inner(v, v) * inner(g, g)) ** 0.5, rel=1e-6)
    with pytest.raises(
        UserError, match=r"Cosines needs Adam's second moment, but .* without any training; set model\.pre"
    ):
        path_select(exact, tmp_path / "adam", path, **ADAM)


class ByScorer(ScoringPath):
    """The run's scorer at the end of a path to the target, with the second moment of that path's training."""

    needs = ("scorer_direction",)

    def walk(self, training: PathTraining) -> Iterator[None]:
        """The whole training."""
        yield
        training.train(training.steps)
        yield

    def direction(self, piece: Piece) -> Tensor:
        """The scorer's."""
        assert piece.scorer_direction is not None
        return piece.scorer_direction


def test_the_second_moment_of_a_path_is_its_own(inputs: Inputs, tmp_path: Path) -> None:
    """So that it needs neither a warm-up nor a checkpoint with a second moment."""
    path = replace(WALK, along=ByScorer())
    base = select(inputs, tmp_path / "base", {"path": path, "warmup": Warmup(fraction=0.0)})
    ready = select(inputs, tmp_path / "ready", {"path": path, "warmup": Warmup(checkpoint=inputs.model)})
    assert base.about.settings["preconditioner"] == "adam"
    assert base.examples.equals(ready.examples)


def test_directions_of_ones_own_take_one_validation_set(inputs: Inputs, tmp_path: Path) -> None:
    """On a path along the target; refused before it is walked."""
    sets = {"validation": {"a": inputs.validation, "b": inputs.validation}}
    options = {"path": replace(WALK, along=Cosines()), "preconditioner": "none"}
    with pytest.raises(UserError, match=r"Cosines has directions of its own .* give data\.validation one source"):
        select(inputs, tmp_path / "out", options, sets)
    assert not list((tmp_path / "out").rglob("path-*"))


class Odd(ScoringPath):
    """Makes a mistake."""

    def __init__(self, mistake: str, folder: str = "") -> None:
        self.mistake, self.folder = mistake, folder
        if mistake == "trains on nothing":
            self.trains_on = "validation"  # type: ignore[misc, assignment]
        if mistake == "useless need":
            self.needs = ("statistics",)

    def walk(self, training: PathTraining) -> Any:
        """Something else than a path."""
        if self.mistake == "forgets to yield":
            return training.train(1)
        return self._points(training)

    def _points(self, training: PathTraining) -> Iterator[None]:
        yield
        if self.mistake == "half a step":
            training.train(0.5)  # type: ignore[arg-type]
        if self.mistake == "back":
            training.train(-1)
        if self.mistake == "by hand":
            training.train(1)
            with torch.no_grad():
                next(training.model.parameters()).mul_(0.5)
            training.train(1)
        if self.mistake == "loads":
            training.load(self.folder)
        if self.mistake == "not finite":
            with torch.no_grad():
                next(training.model.parameters()).fill_(float("nan"))
        yield


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        ("forgets to yield", r"Odd\.walk yields at 0 points; a path has two or more, its start among them; mend it"),
        ("stays", r"The path of Odd ends at the weights that it starts from, so every score along it is zero"),
        ("half a step", r"trains for 0\.5 steps; mend it to give a whole number"),
        ("back", r"trains for -1 steps; mend it"),
        ("by hand", r"moves the weights between steps of the training.*; mend it to move them before the first step"),
        ("loads", r"no such folder; give a local Hugging Face model folder"),
        (
            "not finite",
            r"The path of Odd comes to weights that are not finite at point 1; lower model\.path\.learning_rate",
        ),
        ("trains on nothing", r"Odd has trains_on 'validation'; it is 'target' or 'pool'"),
        ("useless need", r"Odd needs statistics, which is measured only where .*; define its direction too"),
    ],
)
def test_mistakes_of_a_walk_are_told(inputs: Inputs, tmp_path: Path, mistake: str, told: str) -> None:
    """In one sentence, and nothing is left that looks like a selection."""
    with pytest.raises(UserError, match=told):
        select(inputs, tmp_path / "out", {"path": replace(WALK, along=Odd(mistake, "./nowhere"))})
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_checkpoint_of_another_model_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    """By name or shape of its weights."""
    other = write_inputs(tmp_path / "other", LINES, VALIDATION, hidden_size=16)
    with pytest.raises(UserError, match=r"has other weights, by name or shape, than the model"):
        select(inputs, tmp_path / "out", {"path": replace(WALK, along=Odd("loads", other.model))})


class Squares(ScoringPath):
    """Adds up the squares of the falls along the pieces."""

    def contribution(self, rows: PieceRows) -> Tensor:
        """Squares."""
        return rows.score.square()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"token_scores": True}, r"model\.token_scores is set, but Squares says itself"),
        ({"order": "parameters_then_data"}, r"scores examples by the chosen weights alone, but Squares"),
        ({"order": "data_then_parameters", "rounds": 2}, r"model\.rounds 2 scores examples by the chosen weights"),
        ({"normalize": "tokens"}, r"model\.normalize is tokens, but"),
    ],
)
def test_sums_that_a_rule_does_not_take_are_refused(
    inputs: Inputs, tmp_path: Path, options: dict[str, Any], told: str
) -> None:
    """Where it says itself what its pieces add, the scores are neither sums over tokens nor over chosen weights."""
    with pytest.raises(UserError, match=told):
        select(inputs, tmp_path / "out", {"path": replace(WALK, along=Squares()), **options})


def test_what_a_rule_adds_up_is_not_normalised(exact: Inputs, tmp_path: Path) -> None:
    """Unless it is asked for: a share of the loss at the start is what falls are given as."""
    assert PathSettings(along=Squares()).normalization == "none"
    found = path_select(exact, tmp_path / "out", replace(WALK, along=Squares(), pieces=1, normalize=None), order="data")
    falls = path_select(exact, tmp_path / "falls", replace(WALK, pieces=1, normalize="none"), order="data")
    assert finite_scores(found) == pytest.approx([fall**2 for fall in finite_scores(falls)], rel=1e-9)
