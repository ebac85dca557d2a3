"""The prior, and terms of one's own, through a whole selection: scores by autograd over single examples, in float64."""

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from dualsft import SelectionModule
from dualsft.cli import run
from dualsft.data.layout import Batch, Layout
from dualsft.errors import UserError
from dualsft.matrix import curvature
from dualsft.models.loading import load_model
from dualsft.objectives import Objective, SelfDistillation, example_losses
from dualsft.scorers import FirstOrder, HessianVector, Scorer
from dualsft.selection import Selection, Warmup, load_selection, passes
from dualsft.selection.dense_training import EPS
from dualsft.selection.prior import Prior
from dualsft.sharding import strategy
from tests.cases import Example, Gradients, collate
from tests.references import assert_same_gradients, float64_throughout, gradient_loop, inner, slow_prior, total
from tests.world.data import OK
from tests.world.faults import kill_at, killed_run, poisoned_by
from tests.world.jobs import Inputs, contents, select, write_job
from tests.world.models import save_tiny_model

PRIOR = Prior(weight=5.0, fraction=0.4)
"""Heavy, as a random model is sure of nothing."""
STEP = 0.3
"""η, with which the quadratic term of plain gradients is about as large as the linear one."""
PLAIN: dict[str, Any] = {"preconditioner": "none", "step_size": STEP, "dtype": "float64"}
BASE: dict[str, Any] = {**PLAIN, "warmup": Warmup(fraction=0.0)}

Value = Callable[[PreTrainedModel], Tensor]
"""A term of V as a function of the model."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A ready scoring checkpoint, with weights of its own."""
    return save_tiny_model(tmp_path_factory.mktemp("checkpoint"), seed=7)


@pytest.fixture
def wide() -> Iterator[None]:
    """Models compute in float64 throughout, so that what is left of a difference is the stored scores' float32."""
    with float64_throughout():
        yield


def at(checkpoint: str, **options: Any) -> dict[str, Any]:
    """Options of a selection at a ready checkpoint."""
    return {**PLAIN, "warmup": Warmup(checkpoint=checkpoint), "prior": PRIOR, **options}


def load(name: str) -> PreTrainedModel:
    """A model in float64 whose attention can be differentiated twice."""
    model = load_model(name, "float64").eval()
    model.set_attn_implementation("eager")
    return model


def mean(values: Sequence[Tensor]) -> Tensor:
    """Of several numbers."""
    return torch.stack(list(values)).mean()


def prior_of(inputs: Inputs, prior: Prior, anchors: Sequence[int]) -> Value:
    """λ times the mean prior loss of these anchors against the base model."""
    base, pool = load(inputs.model), inputs.examples("train")
    return lambda model: prior.weight * mean([slow_prior(model, base, pool[i], prior) for i in anchors])


def anchors_of(prior: Prior, seed: int = 0) -> list[int]:
    """The anchors that a run draws."""
    return prior.term().draw(OK, seed)


def reference(
    inputs: Inputs,
    scorer: Scorer,
    checkpoint: str,
    further: Sequence[Value],
    preconditioner: Callable[[str], Any] = lambda _: 1.0,
    step_size: float = STEP,
    pool: Sequence[int] = OK,
) -> tuple[dict[int, float], Gradients]:
    """φ_i and φ_j from u = (η/n) P ⊙ (v − ½ η H (P ⊙ ḡ)), V differentiated once and, for a Hessian, twice."""
    model, train = load(checkpoint), inputs.examples("train")
    gradients = gradient_loop(model, [train[i] for i in pool])
    names, parameters = zip(*model.named_parameters(), strict=True)
    likelihood = [example_losses(model, collate([e])).sum() for e in inputs.examples("validation").values()]
    V = mean(likelihood) + sum(term(model) for term in further)
    slope = dict(zip(names, torch.autograd.grad(V, parameters, create_graph=True), strict=True))
    bend: Gradients = {name: torch.zeros_like(v) for name, v in slope.items()}
    if isinstance(scorer, HessianVector):
        along = sum((slope[n] * preconditioner(n) * g / len(pool)).sum() for n, g in total(gradients).items())
        bend = dict(zip(names, torch.autograd.grad(along, parameters), strict=True))
    u = {
        name: step_size / len(pool) * preconditioner(name) * (v.detach() - step_size / 2 * bend[name])
        for name, v in slope.items()
    }
    rows = {i: inner(u, g) for i, g in zip(pool, gradients, strict=True)}
    return rows, {name: u[name] * g for name, g in total(gradients).items()}


def rows_of(selection: Selection) -> dict[int, float]:
    """φ_i by example id."""
    return {i: score for i, score in enumerate(selection.examples["score"].to_pylist()) if score is not None}


def assert_scores(selection: Selection, expected: tuple[dict[int, float], Gradients], relative: float = 1e-6) -> None:
    """Both vectors, each up to a fraction of its largest entry; 1e-6 is float32's rounding, in which they are kept."""
    rows, weights = expected
    assert rows_of(selection) == pytest.approx(rows, rel=0, abs=relative * max(map(abs, rows.values())))
    assert_same_gradients(selection.parameter_scores(), weights, relative)


def scores_of(selection: Selection) -> tuple[dict[int, float], Gradients]:
    """Both vectors of a selection, to compare others with."""
    return rows_of(selection), selection.parameter_scores()


def differ(one: Selection, other: tuple[dict[int, float], Gradients]) -> bool:
    """Whether example scores differ by a thousandth of the largest: a thousand times what equal ones may."""
    rows, largest = rows_of(one), max(map(abs, other[0].values()))
    return max(abs(rows[i] - value) for i, value in other[0].items()) > 1e-3 * largest


def phases_of(selection: Selection) -> list[str]:
    """The names of a run's phases, in order."""
    return [phase["name"] for phase in selection.manifest["phases"]]


@pytest.mark.slow
@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize(
    ("prior", "scorer"),
    [
        (PRIOR, FirstOrder()),
        (PRIOR, HessianVector()),
        (Prior(weight=2.0, fraction=1.0, temperature=1.0, confidence="uniform"), HessianVector()),
        (Prior(weight=2.0, fraction=0.1, temperature=0.7, confidence="entropy_inv"), FirstOrder()),
    ],
    ids=["max_prob", "max_prob hessian", "uniform hessian", "entropy_inv"],
)
def test_scores_at_a_checkpoint_are_those_of_both_terms(
    inputs: Inputs, tmp_path: Path, checkpoint: str, prior: Prior, scorer: Scorer
) -> None:
    """Both vectors are autograd's of mean validation loss + λ mean prior of the anchors, drawn by the run's seed."""
    found = select(inputs, tmp_path, at(checkpoint, prior=prior, scorer=scorer), seed=3)
    term = prior_of(inputs, prior, anchors_of(prior, seed=3))
    assert_scores(found, reference(inputs, scorer, checkpoint, [term]))
    assert differ(found, reference(inputs, scorer, checkpoint, []))
    if isinstance(scorer, HessianVector):
        assert 0.1 < found.manifest["prediction"]["second_order_share"] < 10


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("scorer", [FirstOrder(), HessianVector()], ids=["first order", "hessian"])
def test_scores_after_a_warm_up_are_those_of_both_terms(inputs: Inputs, tmp_path: Path, scorer: Scorer) -> None:
    """The teacher is the model from before the warm-up; the anchors are not what it was warmed up on."""
    warmup, step_size = Warmup(fraction=0.5, epochs=3, learning_rate=2e-2, keep=True), 1e-6
    options = {"dtype": "float64", "warmup": warmup, "step_size": step_size, "prior": PRIOR, "scorer": scorer}
    found = select(inputs, tmp_path / "out", options)
    kept = tmp_path / "out" / "warmup"
    moments = load_file(kept / "second_moment.safetensors")
    anchors = anchors_of(PRIOR)
    assert anchors != warmup.draw(OK, 0)
    adam = lambda name: 1 / (moments[name].double().sqrt() + EPS)  # noqa: E731
    expected = reference(inputs, scorer, str(kept), [prior_of(inputs, PRIOR, anchors)], adam, step_size)
    assert_scores(found, expected, 3e-6)
    assert differ(found, reference(inputs, scorer, str(kept), [], adam, step_size))


@pytest.mark.parametrize("order", ["parameters_then_data", "data_then_parameters"])
def test_a_side_chosen_first_does_not_touch_the_prior(
    inputs: Inputs, tmp_path: Path, checkpoint: str, order: str
) -> None:
    """In every order the prior's gradient is taken once, over all of its anchors."""
    options = at(checkpoint, order=order, rounds=2, data_budget=0.5, parameter_budget=0.5)
    names = phases_of(select(inputs, tmp_path, options))
    assert names.count("prior gradient") == 1
    assert names.index("prior gradient") == 1


PRECISIONS = [
    ("32-true", "auto"),
    ("32-true", "bfloat16"),
    ("32-true", "float64"),
    ("bf16-mixed", "auto"),
    ("bf16-mixed", "bfloat16"),
    ("bf16-true", "auto"),
    ("64-true", "auto"),
]


def count_loads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts how often a selection loads weights."""
    return kill_at(monkeypatch, strategy, "load_model", call=0)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "dtype"), PRECISIONS[:4])
def test_the_base_model_is_its_own_teacher(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, dtype: str
) -> None:
    """Where scoring is at the base model, first-order scores are those without a prior, and nothing is loaded for it.

    Up to the rounding of the losses, which are float32 at least: the gradient of two equal distributions.
    """
    options = {**BASE, "dtype": dtype}
    plain = select(inputs, tmp_path / "plain", options, precision=precision)
    loads = count_loads(monkeypatch)
    found = select(inputs, tmp_path / "prior", {**options, "prior": PRIOR}, precision=precision)
    assert len(loads) == 1
    assert_scores(found, scores_of(plain), 1e-5)
    assert phases_of(found) == ["validation gradient", "prior gradient", "scores"]


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "dtype"), PRECISIONS)
def test_a_copy_of_the_base_model_computes_as_the_model_does(
    inputs: Inputs, tmp_path: Path, precision: str, dtype: str
) -> None:
    """In every precision: at a checkpoint with the base model's own weights, a loaded teacher finds no divergence.

    First-order scores are then those without a prior, up to the rounding of the losses, which are float32 at least.
    """
    options = {**PLAIN, "dtype": dtype, "warmup": Warmup(checkpoint=save_tiny_model(tmp_path / "same"))}
    plain = select(inputs, tmp_path / "plain", options, precision=precision)
    found = select(inputs, tmp_path / "prior", {**options, "prior": PRIOR}, precision=precision)
    assert_scores(found, scores_of(plain), 1e-5)


@pytest.fixture
def short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Differences over a millionth of the weights, whose error of order ε² is lost in float32's rounding."""
    monkeypatch.setitem(curvature._RELATIVE_STEP, torch.float64, 1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("wide", "short_steps")
def test_the_prior_bends_the_objective_at_the_base_model(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its curvature is not zero there, differentiated twice without a copy, or by differences with one.

    The copy is needed as the model itself is displaced; with itself as teacher it would not diverge at all.
    """
    loads = count_loads(monkeypatch)
    exact = select(inputs, tmp_path / "exact", {**BASE, "prior": PRIOR, "scorer": HessianVector()})
    assert len(loads) == 1
    term = prior_of(inputs, PRIOR, anchors_of(PRIOR))
    assert_scores(exact, reference(inputs, HessianVector(), inputs.model, [term]))
    assert differ(exact, reference(inputs, HessianVector(), inputs.model, []))
    finite = {**BASE, "prior": PRIOR, "scorer": HessianVector("finite_difference")}
    assert_scores(select(inputs, tmp_path / "finite", finite), scores_of(exact))
    assert len(loads) > 2


@pytest.mark.slow
@pytest.mark.parametrize("where", ["base", "checkpoint"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_differences_by_the_usual_step_agree_with_second_derivatives(
    inputs: Inputs, tmp_path: Path, checkpoint: str, dtype: str, where: str
) -> None:
    """To some thousandths in either type: the norms of a Llama compute in float32 whatever its weights are."""
    options = {**(at(checkpoint) if where == "checkpoint" else BASE), "prior": PRIOR, "dtype": dtype}
    exact, finite = (
        select(inputs, tmp_path / method, {**options, "scorer": HessianVector(method)})
        for method in ("exact", "finite_difference")
    )
    assert_scores(finite, scores_of(exact), 3e-3)


def teachers_seen(monkeypatch: pytest.MonkeyPatch) -> tuple[list[weakref.ref[Any]], list[int], list[SelectionModule]]:
    """Models that a selection has loaded, how many of them are alive at the start of each pass, and the module."""
    loaded: list[weakref.ref[Any]] = []
    alive: list[int] = []
    made: list[SelectionModule] = []
    load, gradient_pass = strategy.load_model, passes.gradient_pass

    def watched_load(*args: Any) -> PreTrainedModel:
        loaded.append(weakref.ref(model := load(*args)))
        return model

    def watched_pass(*args: Any, **options: Any) -> Any:
        alive.append(sum(model() is not None for model in loaded))
        return gradient_pass(*args, **options)

    class Watched(SelectionModule):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(strategy, "load_model", watched_load)
    monkeypatch.setattr(passes, "gradient_pass", watched_pass)
    monkeypatch.setattr("tests.world.jobs.SelectionModule", Watched)
    return loaded, alive, made


@pytest.mark.slow
@pytest.mark.parametrize("method", ["exact", "finite_difference"])
@pytest.mark.parametrize("where", ["base", "checkpoint"])
def test_the_teacher_is_held_for_its_passes_alone(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: str, where: str, method: Any
) -> None:
    """A second model is in memory in the prior's passes and in no other, and the first is left as it was.

    It goes at once, not when Python next looks for cycles: the pass after it may need the room.
    """
    loaded, alive, made = teachers_seen(monkeypatch)
    options = at(checkpoint) if where == "checkpoint" else {**BASE, "prior": PRIOR}
    gc.disable()
    try:
        found = select(inputs, tmp_path / "out", {**options, "scorer": HessianVector(method)})
        assert [model() is not None for model in loaded] == [True] + [False] * (len(loaded) - 1)
    finally:
        gc.enable()
    lends = lambda name: name.startswith("prior") and (where == "checkpoint" or "step" in name)  # noqa: E731
    assert alive == [2 if lends(name) else 1 for name in phases_of(found)]
    before = load_model(checkpoint if where == "checkpoint" else inputs.model, "float64").state_dict()
    after = made[0].model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_without_weight_there_is_no_prior(inputs: Inputs, tmp_path: Path, checkpoint: str) -> None:
    """By default nothing is drawn, loaded or passed over for it."""
    found = select(inputs, tmp_path, at(checkpoint, prior=Prior()))
    assert found.manifest["prior"]["weight"] == 0
    assert phases_of(found) == ["validation gradient", "scores"]


def test_the_manifest_tells_of_the_prior(inputs: Inputs, tmp_path: Path, checkpoint: str) -> None:
    """Its settings, and what its pass cost: it goes over the anchors once."""
    found = select(inputs, tmp_path, at(checkpoint, scorer=HessianVector()))
    assert found.manifest["prior"] == asdict(PRIOR)
    assert found.manifest["objectives"] == []
    assert phases_of(found) == [
        *("validation gradient", "prior gradient", "pool gradient"),
        *("validation Hessian-vector product", "prior Hessian-vector product", "scores"),
    ]
    counts = {phase["name"]: phase["examples"] for phase in found.manifest["phases"]}
    assert counts["prior gradient"] == counts["prior Hessian-vector product"] == len(anchors_of(PRIOR)) == 3


def test_validation_sets_share_the_prior(inputs: Inputs, tmp_path: Path, checkpoint: str) -> None:
    """With several sets it is passed over once, and is in the objective of each."""
    one = select(inputs, tmp_path / "one", at(checkpoint, scorer=HessianVector()))
    twice = {"a": inputs.validation, "b": inputs.validation}
    named = select(inputs, tmp_path / "two", at(checkpoint, scorer=HessianVector()), {"validation": twice})
    assert_scores(named, scores_of(one))
    for name in twice:
        scores = [s for s in named.examples[f"score_{name}"].to_pylist() if s is not None]
        assert scores == pytest.approx(list(rows_of(one).values()), rel=1e-6)
    assert phases_of(named).count("prior gradient") == phases_of(named).count("prior Hessian-vector product") == 1


@pytest.mark.usefixtures("wide")
def test_packed_anchors_give_the_padded_scores(inputs: Inputs, tmp_path: Path, checkpoint: str) -> None:
    """Model and teacher see each anchor alone, whatever shares its row."""
    prior = Prior(weight=2.0, fraction=1.0, confidence="entropy_inv")
    options = at(checkpoint, prior=prior, scorer=HessianVector())
    padded, packed = (
        select(inputs, tmp_path / f"{packing}", options, {"packing": packing}) for packing in (False, True)
    )
    assert_scores(packed, scores_of(padded))


def test_recomputed_activations_change_nothing(inputs: Inputs, tmp_path: Path, checkpoint: str) -> None:
    """The prior's passes, second derivatives included, are the same with gradient checkpointing."""
    plain, recomputed = (
        select(inputs, tmp_path / f"{on}", at(checkpoint, scorer=HessianVector(), gradient_checkpointing=on))
        for on in (False, True)
    )
    assert contents(plain.folder) == contents(recomputed.folder)


BAD = {0, 9}
"""The only examples of the pool with a 4, or with a P."""


@pytest.mark.slow
@pytest.mark.parametrize(("where", "packing"), [("base", False), ("checkpoint", False), ("checkpoint", True)])
def test_anchors_that_are_not_finite_are_left_out(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: str, where: str, packing: bool
) -> None:
    """The prior's mean, its curvature's too, is over the others, as if the bad ones had not been drawn."""
    prior = Prior(weight=2.0, fraction=1.0)
    start = checkpoint if where == "checkpoint" else inputs.model
    good = [i for i in OK if i not in BAD]
    expected = reference(inputs, HessianVector(), start, [prior_of(inputs, prior, good)], pool=good)
    monkeypatch.setattr("tests.world.jobs.SelectionModule", poisoned_by(gradient="4", loss="P"))
    options = at(checkpoint) if where == "checkpoint" else BASE
    found = select(inputs, tmp_path, {**options, "prior": prior, "scorer": HessianVector()}, {"packing": packing})
    assert set(rows_of(found)) == set(good)
    assert_scores(found, expected, 1e-5)


def test_a_prior_without_a_finite_anchor_is_an_error(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: str
) -> None:
    """It is the prior that is named."""
    only_bad = Prior(weight=1.0, fraction=0.01)
    seed = next(seed for seed in range(100) if set(anchors_of(only_bad, seed)) <= BAD)
    monkeypatch.setattr("tests.world.jobs.SelectionModule", poisoned_by(gradient="4", loss="P"))
    with pytest.raises(UserError, match="No prior example has a finite loss and gradient"):
        select(inputs, tmp_path, at(checkpoint, prior=only_bad), seed=seed)


SECOND_ORDER: dict[str, Any] = {
    "warmup": Warmup(fraction=0.5, epochs=2, learning_rate=1e-3, keep=True),
    "prior": Prior(weight=0.5, fraction=1.0),
    "scorer": HessianVector("finite_difference"),
    "save_minutes": 1e-9,
}


@pytest.fixture(scope="module")
def unbroken(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an unbroken run leaves."""
    folder = tmp_path_factory.mktemp("unbroken") / "out"
    assert len(phases_of(select(inputs, folder, SECOND_ORDER, seed=1))) == 9
    return contents(folder)


@pytest.mark.heavy
@pytest.mark.parametrize("number", [1, 3, 6, 8])
def test_a_run_killed_at_any_pass_resumes_to_the_same_bytes(
    inputs: Inputs, tmp_path: Path, unbroken: dict[str, bytes], number: int
) -> None:
    """The teacher is the base model again, and displaced weights are back, though a pass was made but not kept."""
    killed_run(inputs, tmp_path, SECOND_ORDER, passes, "gradient_pass", number, True, seed=1)
    select(inputs, tmp_path, SECOND_ORDER, seed=1, resume=True)
    assert contents(tmp_path) == unbroken


@pytest.mark.heavy
@pytest.mark.parametrize("call", [2, 5, 8])
def test_a_run_killed_within_the_prior_resumes_to_the_same_bytes(
    inputs: Inputs, tmp_path: Path, unbroken: dict[str, bytes], call: int
) -> None:
    """From the batch that it died at, the second of the prior's gradient or of either of the displaced ones."""
    killed_run(inputs, tmp_path, SECOND_ORDER, SelfDistillation, "losses", call, seed=1)
    assert list((tmp_path / ".unfinished").glob("prior-gradient*.under-way.safetensors"))
    select(inputs, tmp_path, SECOND_ORDER, seed=1, resume=True)
    assert contents(tmp_path) == unbroken


@pytest.mark.parametrize(
    "prior", [Prior(weight=4.0, fraction=0.4), Prior(weight=5.0, fraction=0.4, confidence="uniform")]
)
def test_another_prior_does_not_resume(inputs: Inputs, tmp_path: Path, checkpoint: str, prior: Prior) -> None:
    """Its settings decide the outcome."""
    killed_run(inputs, tmp_path, at(checkpoint), passes, "gradient_pass", 3)
    with pytest.raises(UserError, match=r"unfinished run with other settings \(prior\)"):
        select(inputs, tmp_path, at(checkpoint, prior=prior), resume=True)


class Ridge(Objective):
    """Half the squared length of the weights, the same for every example."""

    name = "ridge"

    def __init__(self, weight: float = 0.5, ids: list[int] | None = None) -> None:
        self.weight, self.ids = weight, ids

    def draw(self, pool: Sequence[int], seed: int) -> list[int]:
        """The last two, or what it is told."""
        return list(pool[-2:]) if self.ids is None else self.ids

    def losses(self, model: PreTrainedModel, batch: Batch, layout: Layout, teacher: PreTrainedModel | None) -> Tensor:
        """½ ‖θ‖²."""
        assert teacher is None
        length = torch.stack([p.square().sum() for p in model.parameters()]).sum() / 2
        return length.expand(len(layout.spans))


class Calm(Ridge):
    """The mean square of the first layer's output over an example's tokens; the weights behind it take no part."""

    name = "calm"

    def losses(self, model: PreTrainedModel, batch: Batch, layout: Layout, teacher: PreTrainedModel | None) -> Tensor:
        """By example."""
        given = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
        states = model(**given, output_hidden_states=True, use_cache=False).hidden_states[-2]
        lengths = torch.tensor([length for _, _, length in layout.spans])
        inside = torch.zeros(states.shape[:2], dtype=states.dtype)
        for row, first, length in layout.spans:
            inside[row, first : first + length] = 1
        return layout.by_example(states.square().mean(2) * inside).sum(1) / lengths


class Distance(Ridge):
    """The squared distance to the base model's weights, which needs the teacher."""

    name = "distance"
    needs_teacher = True

    def losses(self, model: PreTrainedModel, batch: Batch, layout: Layout, teacher: PreTrainedModel | None) -> Tensor:
        """½ ‖θ − θ_base‖²."""
        assert teacher is not None
        pairs = zip(model.parameters(), teacher.parameters(), strict=True)
        return torch.stack([(p - q.detach()).square().sum() for p, q in pairs]).sum().div(2).expand(len(layout.spans))


def slow_term(inputs: Inputs, objective: Ridge) -> Value:
    """λ times the objective's mean, by itself."""
    pool, base = inputs.examples("train"), load(inputs.model)

    def calm(model: PreTrainedModel, example: Example) -> Tensor:
        ids = torch.tensor([example[0]])
        return model(input_ids=ids, output_hidden_states=True).hidden_states[-2].square().mean()

    def value(model: PreTrainedModel) -> Tensor:
        if isinstance(objective, Calm):
            return objective.weight * mean([calm(model, pool[i]) for i in OK[-2:]])
        if isinstance(objective, Distance):
            pairs = zip(model.parameters(), base.parameters(), strict=True)
            return objective.weight / 2 * torch.stack([(p - q.detach()).square().sum() for p, q in pairs]).sum()
        return objective.weight / 2 * torch.stack([p.square().sum() for p in model.parameters()]).sum()

    return value


def scorer_by(method: str) -> Any:
    """A scorer of the first order, or one that finds its second in this way."""
    return FirstOrder() if method == "first" else HessianVector(method)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def by_the_prior(inputs: Inputs, checkpoint: str) -> Callable[[str], tuple[dict[int, float], Gradients]]:
    """Scores by each such scorer with no other term than the prior."""

    @cache
    def scores(method: str) -> tuple[dict[int, float], Gradients]:
        return reference(inputs, scorer_by(method), checkpoint, [prior_of(inputs, PRIOR, anchors_of(PRIOR))])

    return scores


@pytest.mark.slow
@pytest.mark.usefixtures("wide", "short_steps")
@pytest.mark.parametrize(
    ("objective", "method", "packing"),
    [
        (Ridge(0.2), "first", True),
        (Ridge(0.2), "exact", False),
        (Calm(0.5), "first", False),
        (Calm(0.5), "exact", True),
        (Calm(0.5), "finite_difference", False),
        (Distance(0.2), "exact", False),
        (Distance(0.2), "finite_difference", True),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_term_of_ones_own_is_in_the_scores(
    inputs: Inputs,
    tmp_path: Path,
    checkpoint: str,
    by_the_prior: Callable[[str], tuple[dict[int, float], Gradients]],
    objective: Ridge,
    method: str,
    packing: bool,
) -> None:
    """Of the weights alone, of hidden states, or of the teacher, beside the prior: its gradient and its curvature."""
    scorer = scorer_by(method)
    options = at(checkpoint, scorer=scorer, objectives=[objective])
    found = select(inputs, tmp_path, options, {"packing": packing})
    prior = prior_of(inputs, PRIOR, anchors_of(PRIOR))
    expected = reference(inputs, scorer, checkpoint, [prior, slow_term(inputs, objective)])
    assert_scores(found, expected)
    assert differ(found, by_the_prior(method))
    assert f"{objective.name} gradient" in phases_of(found)
    (told,) = found.manifest["objectives"]
    assert told["class_path"] == f"tests.selection.test_prior.{type(objective).__name__}"
    assert told["options"] == {"weight": objective.weight, "ids": None}


def test_a_term_without_weight_is_left_out(inputs: Inputs, tmp_path: Path, checkpoint: str) -> None:
    """It is not even asked for its examples."""
    found = select(inputs, tmp_path, at(checkpoint, objectives=[Ridge(0.0, ids=[])]))
    assert phases_of(found) == ["validation gradient", "prior gradient", "scores"]


@pytest.mark.usefixtures("wide")
def test_yaml_names_terms_by_class_path(inputs: Inputs, tmp_path: Path, checkpoint: str) -> None:
    """The command line takes the prior's settings and a list of further terms, and its own configuration replays it."""
    model = {
        "dtype": "float64",
        "preconditioner": "none",
        "step_size": STEP,
        "warmup": {"checkpoint": checkpoint},
        "prior": {"weight": 5.0, "fraction": 0.4},
        "objectives": [
            {"class_path": "tests.selection.test_prior.Ridge", "init_args": {"weight": 0.05}},
            {"class_path": "tests.selection.test_prior.Calm"},
        ],
    }
    write_job(tmp_path, inputs, model=model, data={"max_length": 48, "batch_tokens": 100})
    run(["select", "--config", str(tmp_path / "job.yaml"), "--output_dir", str(tmp_path / "out")])
    found = load_selection(tmp_path / "out")
    terms = [prior_of(inputs, PRIOR, anchors_of(PRIOR)), slow_term(inputs, Ridge(0.05)), slow_term(inputs, Calm())]
    assert_scores(found, reference(inputs, FirstOrder(), checkpoint, terms))
    assert phases_of(found) == [*("validation gradient", "prior gradient", "ridge gradient", "calm gradient", "scores")]
    again = ["select", "--config", str(tmp_path / "out" / "config.yaml"), "--output_dir", str(tmp_path / "again")]
    run(again)
    for name in ("examples.parquet", "parameter_scores.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.parametrize("ids", [[], [1], [0, 0], [0, 1_000], [-1]], ids=["none", "bare", "twice", "beyond", "before"])
def test_a_term_must_draw_examples_of_the_pool(inputs: Inputs, tmp_path: Path, ids: list[int]) -> None:
    """None, one without a response, one twice or one that is not there: refused by name before any pass, no trace."""
    with pytest.raises(
        UserError, match=r"^Ridge drew \d examples, \d different ones of the pool; it must draw [^.]*\.$"
    ):
        select(inputs, tmp_path / "out", {**BASE, "objectives": [Ridge(ids=ids)]})
    assert not (tmp_path / "out").exists()


def named(*names: str) -> list[Objective]:
    """Terms of these names."""
    made = [type("Term", (Ridge,), {"name": name})(0.5) for name in names]
    return list(made)


@pytest.mark.parametrize("names", [("prior",), ("mine", "mine")], ids="+".join)
def test_terms_of_one_name_are_refused_at_construction(names: tuple[str, ...]) -> None:
    """Of each other, or of the terms that there are anyway; with the name, in one sentence."""
    with pytest.raises(UserError, match=rf"^Several terms of the objective have the name '{names[0]}'; [^;]*\.$"):
        SelectionModule("nowhere", **BASE, objectives=named(*names))


@pytest.mark.parametrize(
    "names", [("pool",), ("validation",), ("validation-squared",), ("my own", "my-own")], ids="+".join
)
def test_terms_whose_passes_would_share_their_state_are_refused(names: tuple[str, ...]) -> None:
    """With each other, or with the pool's own pass: a pass would take the other's sums for its own."""
    with pytest.raises(UserError, match=rf"has the name '{names[0]}'; give it one of letters"):
        SelectionModule("nowhere", **BASE, objectives=named(*names))


@pytest.mark.parametrize("scorer", [FirstOrder(), HessianVector()], ids=lambda s: type(s).__name__)
def test_a_prior_that_changes_nothing_is_told(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str], scorer: Scorer
) -> None:
    """At the untouched base model, to whoever does not look at its curvature."""
    select(inputs, tmp_path / "out", {**BASE, "prior": PRIOR, "scorer": scorer})
    told = "model.prior changes nothing without a warm-up" in capfd.readouterr().err
    assert told == isinstance(scorer, FirstOrder)
