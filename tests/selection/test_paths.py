"""Scores along paths: against autograd along the same path in float64, complete, ended and resumed as promised."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, optim
from torch.optim import AdamW

from dualsft import InstructionDataModule
from dualsft.errors import UserError
from dualsft.export.model_card import _selection
from dualsft.export.provenance import describe_selection
from dualsft.models import PreTrainedModel
from dualsft.models.loading import load_model
from dualsft.objectives import example_losses
from dualsft.paths import PathTraining, Piece, PieceRows, PoolPath, ScoringPath, TargetPath
from dualsft.runs.phase_store import PhaseStore
from dualsft.scorers import HessianVector
from dualsft.selection import Selection, Warmup
from dualsft.selection import run as method
from dualsft.selection.dense_training import BETAS, EPS
from dualsft.selection.manifest import PUBLISHED
from dualsft.selection.paths.ending import ending, split
from dualsft.selection.paths.settings import PathSettings
from dualsft.selection.prior import Prior
from dualsft.selection.reallocation import reallocate
from tests.cases import Gradients, collate
from tests.references import assert_same_gradients, gradient_loop, inner, total
from tests.world.damage import damage_file
from tests.world.data import LINES, VALIDATION
from tests.world.faults import PoolAware, kill_often, killed_run, poisoned_by
from tests.world.jobs import ADAM, Inputs, contents, select, write_inputs

EXACT: dict[str, Any] = {"dtype": "float64", "warmup": Warmup(fraction=0.0)}
WALK = PathSettings(along=TargetPath(), epochs=2, learning_rate=3e-3, pieces=2, held_out=0.0, tolerance=10.0)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A float64 model with a pool and two dozen validation rows."""
    return write_inputs(tmp_path_factory.mktemp("exact"), LINES, VALIDATION * 2, dtype=torch.float64)


def path_select(inputs: Inputs, folder: Path, path: PathSettings, data: Any = None, **options: Any) -> Selection:
    """A selection along a path, in float64."""
    return select(inputs, folder, {**EXACT, "path": path, **options}, data, precision="64-true")


def nodes(inputs: Inputs, path: PathSettings, data: InstructionDataModule) -> tuple[PreTrainedModel, list[Gradients]]:
    """The weights at both ends of each piece, by a plain loop of torch's optimizer over the same batches."""
    model: PreTrainedModel = load_model(inputs.model, "float64").train()
    rate = path.learning_rate or 0.0
    optimizer = (
        AdamW(model.parameters(), lr=rate, betas=BETAS, eps=EPS, weight_decay=0.0)
        if path.optimizer == "adamw"
        else optim.SGD(model.parameters(), lr=rate)
    )
    loader = data.training_loader(data.validation_sets["validation"].ok_ids(), 0, "validation")
    found, taken = [weights_of(model)], 0
    ends = path.ends(len(loader) * (path.epochs or 1))
    for epoch in range(path.epochs or 1):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for batch in loader:
            example_losses(model, batch).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            taken += 1
            if taken in ends:
                found.append(weights_of(model))
    return model.eval(), found


def weights_of(model: PreTrainedModel) -> Gradients:
    """A copy of the weights."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@torch.no_grad()
def set_weights(model: PreTrainedModel, weights: Gradients) -> None:
    """Put weights into a model."""
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])


RULES = {
    "left": [(0.0, 1.0)],
    "midpoint": [(0.5, 1.0)],
    "trapezoid": [(0.0, 0.5), (1.0, 0.5)],
}


def brute_force(
    inputs: Inputs, model: PreTrainedModel, points: list[Gradients], rule: str, which: str
) -> tuple[dict[int, float], Gradients]:
    """Rows and columns by one example's gradient at a time, at every point of every piece."""
    examples = inputs.examples(which)
    rows = dict.fromkeys(examples, 0.0)
    columns: Gradients = {n: torch.zeros_like(w) for n, w in points[0].items()}
    for a, b in pairwise(points):
        for share, weight in RULES[rule]:
            set_weights(model, {n: a[n] + share * (b[n] - a[n]) for n in a})
            u = {n: weight * (a[n] - b[n]) for n in a}
            gradients = gradient_loop(model, examples.values())
            for i, g in zip(examples, gradients, strict=True):
                rows[i] += inner(u, g)
            for n, summed in total(gradients).items():
                columns[n] += u[n] * summed
    return rows, columns


def losses(inputs: Inputs, model: PreTrainedModel, weights: Gradients, which: str = "train") -> dict[int, float]:
    """l_i of each example alone."""
    set_weights(model, weights)
    with torch.no_grad():
        return {i: float(example_losses(model, collate([e])).sum()) for i, e in inputs.examples(which).items()}


@pytest.mark.parametrize(("rule", "optimizer"), [*zip(RULES, ("adamw", "sgd", "adamw"), strict=True)])
def test_both_sums_are_those_of_autograd_along_the_path(
    exact: Inputs, tmp_path: Path, rule: Any, optimizer: Any
) -> None:
    """Rows over the pool, columns over the pool and over the validation set, at each rule's points."""
    path = replace(WALK, quadrature=rule, optimizer=optimizer, columns="pool", normalize="none")
    model, points = nodes(exact, path, exact.data())
    found = path_select(exact, tmp_path / "pool", path)
    pool = found.parameter_scores()
    rows, columns = brute_force(exact, model, points, rule, "train")
    scores = found.examples["score"].to_pylist()
    assert {i: scores[i] for i in rows} == pytest.approx(rows, rel=1e-8, abs=1e-12)
    assert_same_gradients(pool, columns, 1e-6)
    # over the validation set: the mean, and the examples' scores are the falls themselves
    found = path_select(exact, tmp_path / "target", replace(path, columns="target"))
    _, columns = brute_force(exact, model, points, rule, "validation")
    count = len(exact.examples("validation"))
    assert_same_gradients(found.parameter_scores(), {n: c / count for n, c in columns.items()}, 1e-6)
    before, after = (losses(exact, model, weights) for weights in (points[0], points[-1]))
    scores = found.examples["score"].to_pylist()
    assert {i: scores[i] for i in before} == pytest.approx({i: before[i] - after[i] for i in before}, rel=1e-9)
    # and the product of both
    product = path_select(exact, tmp_path / "product", replace(path, columns="product")).parameter_scores()
    assert_same_gradients(product, {n: pool[n].double() * columns[n] / count for n in pool}, 1e-5)


def test_the_normalisations_are_of_the_falls(exact: Inputs, tmp_path: Path) -> None:
    """Shares of the initial loss, and the fall summed over the tokens; contributions by token add up to them."""
    model, points = nodes(exact, WALK, exact.data())
    before, after = (losses(exact, model, weights) for weights in (points[0], points[-1]))
    counts = {i: sum(label >= 0 for label in labels[1:]) for i, (_, labels) in exact.examples("train").items()}
    mean = sum(counts[i] * before[i] for i in before) / len(before)
    for kind, factor in {
        "none": lambda i, n: 1.0,
        "initial_loss": lambda i, n: 1 / before[i],
        "length": lambda i, n: n,
        "smoothed_loss": lambda i, n: n / (n * before[i] + mean),
    }.items():
        path = replace(WALK, normalize=kind)  # type: ignore[arg-type]
        table = path_select(exact, tmp_path / kind, path).examples.to_pydict()
        expected = {i: (before[i] - after[i]) * factor(i, table["num_tokens"][i]) for i in before}
        assert {i: table["score"][i] for i in before} == pytest.approx(expected, rel=1e-9)
    # by the last one's factors
    told = path_select(exact, tmp_path / "tokens", replace(path, columns="pool"), token_scores=True)
    assert told.token_scores is not None
    for row in told.token_scores.to_pylist():
        assert sum(row["score"]) == pytest.approx(told.examples["score"][row["example_id"]].as_py(), rel=1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_the_path_is_cut_until_the_scores_are_complete(exact: Inputs, tmp_path: Path, rule: Any) -> None:
    """On one long piece: the error falls at the rule's order, and the manifest has it before and after."""
    path = replace(WALK, quadrature=rule, columns="pool", pieces=1, learning_rate=2e-2, most_pieces=1)
    errors = {}
    for most in (1, 9):
        found = path_select(exact, tmp_path / str(most), replace(path, most_pieces=most, tolerance=1e-9))
        told = found.manifest["path_walked"]["validation"]["pool"]
        errors[told["pieces"]] = told["row_error"]
        assert not told["reached"]
        assert told["column_sum"] == pytest.approx(told["row_sum"], rel=1e-9)
    most = max(errors)
    assert errors[1] / errors[most] > most ** (0.7 if rule == "left" else 1.5)
    wanted = path_select(exact, tmp_path / "wanted", replace(path, most_pieces=64, tolerance=errors[most] * 1.01))
    told = wanted.manifest["path_walked"]["validation"]["pool"]
    assert told["reached"]
    assert told["pieces"] == most


def test_a_path_to_the_target_starts_at_the_scoring_checkpoint(inputs: Inputs, tmp_path: Path) -> None:
    """Which the warm-up makes, or has made before."""
    made = select(inputs, tmp_path / "made", {"path": WALK, "warmup": replace(ADAM["warmup"], keep=True)})
    ready = select(inputs, tmp_path / "ready", {"path": WALK, "warmup": Warmup(checkpoint=f"{made.folder}/warmup")})
    base = select(inputs, tmp_path / "base", {"path": WALK, "warmup": Warmup(fraction=0.0)})
    assert made.examples.equals(ready.examples)
    assert made.examples["score"] != base.examples["score"]


def test_the_held_out_part_ends_the_path(tmp_path: Path) -> None:
    """At the point where its loss is lowest; later points are walked, and score nothing."""
    rows = [json.dumps({"prompt": f"{k}", "response": f"{k * 7919 % 1000}"}) for k in range(12)]
    inputs = write_inputs(tmp_path, LINES, rows)
    path = replace(WALK, epochs=12, pieces=12, held_out=0.25, learning_rate=1e-2, tolerance=0.2)
    told = select(inputs, tmp_path / "out", {"path": path}).manifest["path_walked"]["validation"]
    held_out = told["held_out_losses"]
    assert len(held_out) == 13
    best = held_out.index(min(held_out))
    assert 0 < best < 12
    assert (len(told["steps"]) - 1, told["walked_steps"]) == (best, 12 * 5)


def test_a_path_that_teaches_nothing_is_refused(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the held-out part only loses; without such a part the user has decided."""
    with pytest.raises(UserError, match=r"does not lower the loss of its held-out part \(.*held_out to 0"):
        select(inputs, tmp_path / "out", {"path": replace(WALK, held_out=0.4, learning_rate=30.0)})
    with pytest.raises(UserError, match="does not lower"):
        ending([1.0, 1.0, 2.0], "validation")
    assert ending([3.0, 1.0, 2.0], "validation") == 1
    assert ending([3.0, 2.8, 2.9], "validation") == 1
    (told,) = capsys.readouterr().err.splitlines()[-1:]
    assert "lowers the loss of its held-out part by 7% alone (3 to 2.8)" in told


def test_a_part_is_held_out_at_random() -> None:
    """By the seed, never all of it, and nothing of a single example."""
    apart, others = split(list(range(10, 30)), 0.25, 3)
    assert sorted([*apart, *others]) == list(range(10, 30))
    assert len(apart) == 5
    assert split(list(range(10, 30)), 0.25, 4)[0] != apart
    assert split([7], 0.9, 0) == ([], [7])
    assert split([7, 8], 0.9, 0)[1]


def test_examples_alone_take_no_gradient_of_the_pool(inputs: Inputs, tmp_path: Path) -> None:
    """Where all weights are taken, their scores are not computed, and two passes without gradients score the pool."""
    path = replace(WALK, columns="pool")
    told = select(inputs, tmp_path / "out", {"path": path, "order": "data"})
    names = [phase["name"] for phase in told.manifest["phases"]]
    assert names == ["warm-up", "path", "pool loss at point 0 of the path", "pool loss at point 2 of the path"]
    assert told.manifest["sum_identity"] is None
    assert told.parameter_scores() == {}
    assert all(bool(mask.all()) for mask in told.mask().values())


def test_each_validation_set_has_its_path(exact: Inputs, tmp_path: Path) -> None:
    """Its scores are those of a selection by it alone, and both start where the model is."""
    other = tmp_path / "other.jsonl"
    other.write_text("".join(f"{json.dumps({'prompt': f'{k}', 'response': 'no'})}\n" for k in range(5)))
    path = replace(WALK, held_out=0.25, columns="pool")
    both = path_select(exact, tmp_path / "both", path, {"validation": {"a": exact.validation, "b": str(other)}})
    for name, source in {"a": exact.validation, "b": str(other)}.items():
        alone = path_select(exact, tmp_path / name, path, {"validation": source})
        assert both.examples[f"score_{name}"] == alone.examples["score"]
        walked = both.manifest["path_walked"][name]
        assert walked == alone.manifest["path_walked"]["validation"]
    assert set(both.manifest["sum_identity"]["sets"]) == {"a", "b"}


ORDERS: dict[str, dict[str, Any]] = {
    "examples by the chosen weights": {"order": "parameters_then_data", "rounds": 2},
    "examples by the weights chosen over the pool": {
        "order": "parameters_then_data",
        "path": replace(WALK, columns="pool"),
    },
    "weights by the chosen examples": {"order": "data_then_parameters", "path": replace(WALK, columns="pool")},
}


@pytest.mark.parametrize("order", ORDERS)
def test_either_side_is_scored_by_the_choice_of_the_other(exact: Inputs, tmp_path: Path, order: str) -> None:
    """u ⊙ m scores the examples, and the chosen examples' gradients score the weights."""
    options: dict[str, Any] = {"path": WALK, **ORDERS[order]}
    path = replace(options.pop("path"), normalize="none")
    found = path_select(exact, tmp_path / "out", path, **options)
    model, points = nodes(exact, path, exact.data())
    mask, chosen = found.mask(), found.example_ids
    examples = exact.examples("train")
    rows, columns = dict.fromkeys(examples, 0.0), {n: torch.zeros_like(w) for n, w in points[0].items()}
    for a, b in pairwise(points):
        for end in (a, b):
            set_weights(model, end)
            u = {n: 0.5 * (a[n] - b[n]) for n in a}
            for i, g in zip(rows, gradient_loop(model, examples.values()), strict=True):
                rows[i] += inner({n: u[n] * mask[n] for n in u}, g)
                if i in chosen:
                    columns = {n: columns[n] + u[n] * g[n] for n in u}
    if order.startswith("examples"):
        scores = found.examples["score"].to_pylist()
        assert {i: scores[i] for i in rows} == pytest.approx(rows, rel=1e-7, abs=1e-10)
    else:
        assert_same_gradients(found.parameter_scores(), columns, 1e-6)


# What others do with a selection along a path


def test_other_budgets_on_the_scores_of_a_path(inputs: Inputs, tmp_path: Path) -> None:
    """Both sides, or the examples alone where no weight was scored, which is told to who would choose weights."""
    made = select(inputs, tmp_path / "both", {"path": WALK})
    again = reallocate(made.folder, tmp_path / "more", data_budget=4, parameter_budget=9)
    assert (len(again.example_ids), again.about.counts.parameters.selected) == (4, 9)
    assert again.manifest["path_walked"] == made.manifest["path_walked"]
    alone = select(inputs, tmp_path / "alone", {"path": WALK, "parameter_budget": None, "frozen": ["norm"]})
    fewer = reallocate(alone.folder, tmp_path / "fewer", data_budget=1, parameter_budget=None, trainable=["mlp"])
    assert len(fewer.example_ids) == 1
    for found, left_out in ((alone, lambda name: "norm" in name), (fewer, lambda name: "mlp" not in name)):
        assert {name for name, mask in found.mask().items() if not mask.any()} == set(filter(left_out, found.mask()))
        assert all(mask.all() or not mask.any() for mask in found.mask().values())
    with pytest.raises(UserError, match=r"took all weights and scored none; select again with model\.parameter_b"):
        reallocate(alone.folder, tmp_path / "none", data_budget=1, parameter_budget=9)


def test_weights_that_are_not_scored_are_not_chosen_on_resume(inputs: Inputs, tmp_path: Path) -> None:
    """Without a budget of weights a path to the target has no scores of them."""
    killed_run(inputs, tmp_path, {"path": WALK, "parameter_budget": None}, method, "write_selection")
    with pytest.raises(UserError, match="other settings"):
        select(inputs, tmp_path, {"path": WALK, "parameter_budget": 0.1}, resume=True)


def test_a_published_model_tells_its_path(inputs: Inputs, tmp_path: Path) -> None:
    """And not of a scorer that took no part; the pool's path has both."""
    record = describe_selection(select(inputs, tmp_path / "target", {"path": WALK}).manifest, PUBLISHED)
    assert not {"scorer", "preconditioner", "step_size", "prediction"} & set(record)
    assert record["warmup"]["fraction"] == 0.1
    card = "\n".join(_selection(record))
    assert "dualsft.paths.target.TargetPath" in card
    assert "its row sum, which is how far the path lowers its loss" in card
    pool = select(inputs, tmp_path / "pool", {**ADAM, "path": PathSettings(along=PoolPath())})
    assert {"scorer", "path", "prediction"} <= set(describe_selection(pool.manifest, PUBLISHED))


# Kills

KILLS: dict[str, tuple[PathSettings, dict[str, Any]]] = {
    "target": (replace(WALK, columns="product", held_out=0.25, tolerance=1e-4, most_pieces=8), {}),
    "pool, in two passes": (PathSettings(along=PoolPath(), pieces=2), {**ADAM, "scorer": PoolAware()}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KILLS)
def test_a_killed_path_goes_on_to_the_same_bytes(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Killed after every fifth state that it keeps, in the walk and at each point, and resumed each time."""
    path, others = KILLS[kind]
    options = {"path": path, "save_minutes": 1e-9, "token_scores": True, **others}
    expected = contents(select(inputs, tmp_path / "unbroken", options).folder)
    assert kill_often(inputs, tmp_path / "killed", options, monkeypatch, every=5) > 5
    assert contents(tmp_path / "killed") == expected


@pytest.mark.slow
def test_a_killed_path_leaves_out_the_same_examples(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are not finite are known after a resume, at whichever point they were found."""
    monkeypatch.setattr("tests.world.jobs.SelectionModule", poisoned_by(gradient="4", loss="P"))
    options = {"path": PathSettings(along=PoolPath(), pieces=2), **ADAM}
    unbroken = select(inputs, tmp_path / "unbroken", options)
    assert "nonfinite" in unbroken.examples["status"].to_pylist()
    assert kill_often(inputs, tmp_path / "killed", options, monkeypatch, every=1) > 5
    assert contents(tmp_path / "killed") == contents(unbroken.folder)


@pytest.mark.parametrize("kills", [5, 12])
def test_a_damaged_point_is_walked_again(inputs: Inputs, tmp_path: Path, kills: int) -> None:
    """Whether the walk was under way or over: with all that was kept after it, so that the scores are the same."""
    options = {"path": replace(WALK, pieces=4, columns="pool"), "save_minutes": 1e-9, "warmup": Warmup(fraction=0.0)}
    expected = contents(select(inputs, tmp_path / "unbroken", options).folder)
    killed = tmp_path / "killed"
    killed_run(inputs, killed, options, PhaseStore, "save", kills, True)
    assert bool([*killed.glob("**/path-validation-walked*")]) == (kills == 12)
    (point,) = killed.glob("**/path-validation-point-1.safetensors")
    times = point.stat()
    damage_file(point, "flipped")
    os.utime(point, ns=(times.st_atime_ns, times.st_mtime_ns))
    select(inputs, killed, options, resume=True)
    assert contents(killed) == expected


# Along the pool


@pytest.mark.parametrize("order", ["parameters_then_data", "data_then_parameters"])
def test_the_pool_s_path_by_turns_notes_what_was_predicted(inputs: Inputs, tmp_path: Path, order: str) -> None:
    """Where all weights' sums are known."""
    options = {**ADAM, "path": PathSettings(along=PoolPath(), pieces=2), "order": order}
    found = select(inputs, tmp_path / "out", options)
    assert found.manifest["prediction"]["predicted_improvement"] != 0


def test_one_point_of_the_pools_path_is_the_scoring_checkpoint(inputs: Inputs, tmp_path: Path) -> None:
    """The same scores, choice and prediction as after a warm-up."""
    usual = select(inputs, tmp_path / "usual", ADAM)
    path = PathSettings(along=PoolPath(), pieces=1)
    found = select(inputs, tmp_path / "path", {**ADAM, "path": path})
    assert found.example_ids == usual.example_ids
    scores, due = ([score or 0.0 for score in of.examples["score"].to_pylist()] for of in (found, usual))
    assert scores == pytest.approx(due, rel=1e-5, abs=1e-9)  # (η/n) P ⊙ v is rounded after another product
    assert_same_gradients(found.parameter_scores(), usual.parameter_scores(), 1e-6)
    for key in ("sum_identity", "prediction"):
        ours, right = ({**of.manifest[key], "relative_difference": None} for of in (found, usual))  # a rounding error
        known = [name for name, value in right.items() if value is not None]
        assert ours.keys() == right.keys()
        assert [ours[name] for name in known] == pytest.approx([right[name] for name in known], rel=1e-4)


@pytest.mark.parametrize("scorer", [None, HessianVector()])
def test_several_points_of_the_pools_path_add_up(inputs: Inputs, tmp_path: Path, scorer: Any) -> None:
    """The scores at two checkpoints of the warm-up, for examples and weights."""
    path = PathSettings(along=PoolPath(), pieces=2)
    options = {**ADAM, "scorer": scorer, "step_size": 1e-3}
    found = select(inputs, tmp_path / "path", {**options, "path": path})
    steps = found.manifest["path_walked"]["validation"]["steps"]
    parts = []
    for k, epochs in enumerate((1, 2)):
        alone = {**options, "warmup": replace(ADAM["warmup"], epochs=epochs)}
        parts.append(select(inputs, tmp_path / str(k), alone))
    assert steps[1] * 2 == steps[2]
    scores = [[part.examples["score"][i].as_py() for part in parts] for i in exact_ids(found)]
    assert [found.examples["score"][i].as_py() for i in exact_ids(found)] == pytest.approx(
        [sum(of) for of in scores], rel=1e-5, abs=1e-9
    )
    summed = {n: parts[0].parameter_scores()[n] + t for n, t in parts[1].parameter_scores().items()}
    assert_same_gradients(found.parameter_scores(), summed, 1e-5)


def exact_ids(selection: Selection) -> list[int]:
    """The examples that have a score."""
    table = selection.examples.to_pydict()
    return [i for i, score in zip(table["example_id"], table["score"], strict=True) if score is not None]


# Normalised scores at one checkpoint


@pytest.mark.parametrize("preconditioner", ["adam", "none"])
def test_local_scores_are_normalised(inputs: Inputs, tmp_path: Path, preconditioner: Any) -> None:
    """By the tokens, and to the cosine up to a common factor; sums and weights stay as they are."""
    options = {**ADAM, "preconditioner": preconditioner}
    plain = select(inputs, tmp_path / "plain", options)
    tokens = select(inputs, tmp_path / "tokens", {**options, "normalize": "tokens"})
    cosine = select(inputs, tmp_path / "cosine", {**options, "normalize": "gradient_norm"})
    norm = "preconditioned_gradient_norm" if preconditioner == "adam" else "gradient_norm"
    for row in cosine.examples.to_pylist():
        if row["score"] is not None:
            value = plain.examples["score"][row["example_id"]].as_py()
            assert row["score"] * row[norm] == pytest.approx(value, rel=1e-4)
            assert tokens.examples["score"][row["example_id"]].as_py() == pytest.approx(value * row["num_tokens"])
    assert tokens.manifest["sum_identity"] == plain.manifest["sum_identity"]
    assert_same_gradients(tokens.parameter_scores(), plain.parameter_scores(), 1e-7)


# Paths of one's own


class Straight(ScoringPath):
    """Straight from the start to the end of the training, in three pieces, with a direction of half the length."""

    trains_on = "target"

    def walk(self, training: PathTraining) -> Iterator[None]:
        """One stretch."""
        yield
        training.train(training.steps)
        yield

    def direction(self, piece: Piece) -> Tensor:
        """Half of the way."""
        return (piece.start - piece.end) / 2

    def contribution(self, rows: PieceRows) -> Tensor:
        """Their squares, with the sign."""
        return rows.score * rows.score.abs()


def test_somebodys_path(exact: Inputs, tmp_path: Path) -> None:
    """A direction of its own is taken at the end of each piece, and what it adds to the scores is the rule's."""
    path = replace(WALK, along=Straight(), normalize="none")
    found = path_select(exact, tmp_path / "out", path)
    model, points = nodes(exact, replace(WALK, pieces=1), exact.data())
    set_weights(model, points[-1])
    u = {n: (points[0][n] - points[-1][n]) / 2 for n in points[0]}
    gradients = gradient_loop(model, exact.examples("train").values())
    expected = {i: inner(u, g) * abs(inner(u, g)) for i, g in zip(exact.examples("train"), gradients, strict=True)}
    scores = found.examples["score"].to_pylist()
    assert {i: scores[i] for i in expected} == pytest.approx(expected, rel=1e-8)
    assert_same_gradients(found.parameter_scores(), {n: u[n] * g for n, g in total(gradients).items()}, 1e-6)


class Broken(Straight):
    """Makes a mistake of one's own."""

    def __init__(self, mistake: str) -> None:
        self.mistake = mistake

    def walk(self, training: PathTraining) -> Iterator[None]:
        """Too short, too long, or with an exception."""
        yield
        if self.mistake == "short":
            return
        if self.mistake == "raises":
            raise KeyError("nothing")
        training.train(1000 if self.mistake == "long" else training.steps)
        yield

    def direction(self, piece: Piece) -> Tensor:
        """Of another shape."""
        return torch.zeros(3) if self.mistake == "shape" else piece.start

    def contribution(self, rows: PieceRows) -> Tensor:
        """Of another length."""
        return rows.score[:2] if self.mistake == "length" else rows.score


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        ("short", r"Broken\.walk yields at 1 point; a path has two or more"),
        ("long", r"The path asks for step 1000, but model\.path\.epochs gives 2; raise it"),
        ("raises", r"Broken\.walk failed \(KeyError: 'nothing', at .*test_paths\.py, line \d+\)"),
        (
            "shape",
            r"a direction of torch\.float32 and shape \(3,\), where a tensor of floating point and shape \(\d+, \d+\)",
        ),
        ("length", r"Broken\.contribution must give a finite number for each of 8 examples"),
    ],
)
def test_mistakes_of_a_path_are_told(inputs: Inputs, tmp_path: Path, mistake: str, told: str) -> None:
    """By its name, in one sentence."""
    with pytest.raises(UserError, match=told):
        select(inputs, tmp_path / "out", {"path": replace(WALK, along=Broken(mistake))})


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"epochs": 0}, r"model\.path\.epochs is 0; give at least 1"),
        ({"learning_rate": -1.0}, r"model\.path\.learning_rate is -1\.0"),
        ({"pieces": 0}, r"model\.path\.pieces is 0"),
        ({"pieces": [3, 2]}, r"model\.path\.pieces is \[3, 2\]"),
        ({"held_out": 1.0}, r"model\.path\.held_out is 1\.0"),
        ({"tolerance": 0.0}, r"model\.path\.tolerance is 0\.0"),
        ({"most_pieces": 0}, r"model\.path\.most_pieces is 0"),
        ({"normalize": "loss"}, r"model\.path\.normalize is 'loss'"),
    ],
)
def test_options_are_checked(options: dict[str, Any], told: str) -> None:
    """Each on its own."""
    with pytest.raises(UserError, match=told):
        replace(WALK, **options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"path": replace(WALK, along=PoolPath()), "preconditioner": "none", "warmup": Warmup(fraction=0.0)},
            "warm-up",
        ),
        ({"path": PathSettings(along=PoolPath(), normalize="initial_loss")}, "PoolPath does not score by falls"),
        ({"path": WALK, "normalize": "tokens"}, r"set model\.path\.normalize instead"),
        ({"path": replace(WALK, along=PoolPath(), optimizer="sgd")}, r"model\.path\.optimizer is sgd"),
        ({"path": WALK, "prior": Prior(weight=0.2)}, r"model\.prior\.weight is 0\.2, but along TargetPath"),
        (
            {"path": WALK, "objectives": [Prior(weight=0.2).term()]},
            "but along TargetPath the scores are falls of the loss",
        ),
        ({"path": replace(WALK, along=PoolPath()), "warmup": Warmup(keep=True)}, r"PoolPath is a path in place of"),
        ({"path": replace(WALK, pieces=[3, 2000])}, r"model\.path\.pieces ends at step 2000, but the path has 2"),
    ],
)
def test_contradictions_are_refused(inputs: Inputs, tmp_path: Path, options: dict[str, Any], told: str) -> None:
    """Before anything is computed."""
    with pytest.raises(UserError, match=told):
        select(inputs, tmp_path / "out", options)


def test_an_older_selection_has_no_path(inputs: Inputs, tmp_path: Path) -> None:
    """Its manifest lacks the keys, and means scores at one checkpoint."""
    made = select(inputs, tmp_path / "out", ADAM)
    stored = json.loads((made.folder / "manifest.json").read_text())
    for key in ("path", "path_walked", "normalize"):
        del stored[key]
    (made.folder / "manifest.json").write_text(json.dumps(stored))
    assert contents(made.folder)
    from dualsft import load_selection

    about = load_selection(made.folder).about
    assert about.path_walked is None
    assert about.settings["normalize"] == "none"
