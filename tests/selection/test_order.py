"""Whatever the order of the two sides, each score and each choice is that of a slow obvious loop over the examples."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dualsft import SelectionModule
from dualsft.allocators import GlobalTopK, ScoredExamples, TopK
from dualsft.errors import UserError
from dualsft.matrix.curvature import twice_differentiable
from dualsft.matrix.pass_result import GradientPass
from dualsft.matrix.passes import gradient_pass
from dualsft.matrix.tap import OutputTap
from dualsft.models.loading import load_model
from dualsft.objectives import example_losses
from dualsft.scorers import DiagonalFisher, FirstOrder, HessianVector, Scorer
from dualsft.selection import Selection, passes
from dualsft.selection.passes import Passes
from tests.cases import Gradients, collate, given, make, make_examples, random_direction
from tests.references import (
    assert_rows,
    assert_same_gradients,
    float64_throughout,
    gradient_loop,
    inner,
    inner_size,
    total,
)
from tests.world.data import write_jsonl
from tests.world.faults import PoolAware, killed_run, poisoned_by
from tests.world.jobs import SGD, Inputs, contents, select, write_inputs

LINES = [
    '{"prompt": "What is 2 + 2?", "response": "4, of course."}',
    '{"prompt": "no answer", "response": ""}',
    '{"prompt": "The sea?", "response": "Wide and deep, deep and wide."}',
    '{"prompt": "Paris", "response": "is the capital of France."}',
    '{"prompt": "Say it in code.", "response": "def it(): return [x for x in range(12)]"}',
    '{"prompt": "x", "response": "y"}',
    '{"prompt": "Once upon a time", "response": "there was a king who had no crown."}',
    '{"prompt": "And then?", "response": "He had one made, of gold and glass."}',
    '{"prompt": "What is 1 + 2?", "response": "3, of course."}',
    '{"prompt": "Numbers", "response": "7 8 9 10 11 12 13"}',
]
VALIDATION = [
    '{"prompt": "What is 1 + 1?", "response": "2, of course."}',
    '{"prompt": "Rome", "response": "is the capital of Italy."}',
    '{"prompt": "The king?", "response": "He sleeps."}',
]
OK = [0, 2, 3, 4, 5, 6, 7, 8, 9]
EXAMPLES, WEIGHTS = 5, 100
TIGHT = 1e-10
"""How near a float64 run is to the loop, relative to the numbers that are added; float32 where scores are stored so."""
STORED = 1e-6

PD, DP = "parameters_then_data", "data_then_parameters"
SIDES = {PD: ("parameters", "data"), DP: ("data", "parameters")}
SCORERS: dict[str, Scorer] = {
    "first order": FirstOrder(),
    "fisher": DiagonalFisher("empirical_fisher"),
    "hessian": HessianVector(),
}
STEPS = {"first order": 0.3, "fisher": 30.0, "hessian": 0.1}
"""η at which the second-order term is about as large as the first, so that rounds choose differently."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A tied Llama, and a pool of distinct rows, so that no choice hangs on a tie."""
    return write_inputs(tmp_path_factory.mktemp("inputs"), LINES, VALIDATION)


@dataclass
class Expected:
    """What a run should find and choose.

    Attributes:
        rows: φ_i, as last taken.
        sizes: Of the numbers that each adds.
        weights: φ_j, as last taken.
        mask: The chosen weights.
        chosen: The chosen examples.
        identity: Σ φ over the last rows and the last sum, of the examples and the weights that are in both.
        rounds: As the manifest has it.
    """

    rows: dict[int, float] = field(default_factory=dict)
    sizes: dict[int, float] = field(default_factory=dict)
    weights: Gradients = field(default_factory=dict)
    mask: dict[str, Tensor] = field(default_factory=dict)
    chosen: list[int] = field(default_factory=list)
    identity: float = math.nan
    rounds: list[dict[str, Any]] = field(default_factory=list)


class Slow:
    """Autograd over one unpadded example at a time, float64 all through, and the formulas as they stand."""

    def __init__(self, inputs: Inputs) -> None:
        self._model = load_model(inputs.model, "float64").eval()
        pool = inputs.examples("train")
        self._target = list(inputs.examples("validation").values())
        with float64_throughout():
            self.pool = dict(zip(pool, gradient_loop(self._model, pool.values()), strict=True))
            target = gradient_loop(self._model, self._target)
        self.v = {name: g / len(target) for name, g in total(target).items()}
        squares = [{name: g.square() for name, g in of.items()} for of in target]
        self._fisher = {name: c / len(target) for name, c in total(squares).items()}

    def sums(self, ids: Sequence[int]) -> Gradients:
        """Σ_i g_i."""
        return total([self.pool[i] for i in ids])

    def direction(self, kind: str, ids: Sequence[int]) -> Gradients:
        """U = (η/n) (v − ½ η H ḡ), with ḡ over these n examples."""
        mean = {name: g / len(ids) for name, g in self.sums(ids).items()}
        bend, step = self._curvature(kind, mean), STEPS[kind]
        return {name: step / len(ids) * (v - step / 2 * bend[name]) for name, v in self.v.items()}

    def _curvature(self, kind: str, d: Gradients) -> Gradients:
        if kind == "first order":
            return {name: torch.zeros_like(of) for name, of in d.items()}
        if kind == "fisher":
            return {name: self._fisher[name] * of for name, of in d.items()}
        parameters = dict(self._model.named_parameters())
        with float64_throughout(), twice_differentiable(self._model):
            loss = torch.stack([example_losses(self._model, collate([e])).sum() for e in self._target]).mean()
            slopes = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
            along = torch.stack([(g * d[name]).sum() for name, g in zip(parameters, slopes, strict=True)]).sum()
            return dict(zip(parameters, torch.autograd.grad(along, list(parameters.values())), strict=True))

    def alternate(
        self, kind: str, order: str, rounds: int, examples: int = EXAMPLES, weights: int = WEIGHTS
    ) -> Expected:
        """Both sides in turn: weights over the examples as last chosen, examples by the weights as last chosen."""
        found, u, over = Expected(chosen=list(self.pool)), self.direction(kind, list(self.pool)), list(self.pool)
        for number in range(1, rounds + 1):
            record: dict[str, Any] = {"round": number}
            for side in SIDES[order]:
                if side == "parameters":
                    over = found.chosen
                    u, before = self.direction(kind, over), found.mask
                    found.weights = {name: u[name] * g for name, g in self.sums(over).items()}
                    found.mask = top_weights(found.weights, weights)
                    kept = sum(int((m & before[name]).sum()) for name, m in found.mask.items()) if before else None
                    record[side] = {"selected": weights, "overlap": None if kept is None else kept / weights}
                else:
                    used = {name: of * found.mask[name] for name, of in u.items()} if found.mask else u
                    found.rows = {i: inner(used, g) for i, g in self.pool.items()}
                    found.sizes = {i: inner_size(used, g) for i, g in self.pool.items()}
                    last, found.chosen = found.chosen, top_examples(found.rows, examples)
                    overlap = len(set(last) & set(found.chosen)) / examples if number > 1 else None
                    record[side] = {"selected": examples, "overlap": overlap}
            found.rounds.append(record)
        found.identity = math.fsum(found.rows[i] for i in over)
        return found


def top_weights(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The weights that the default rule takes, of scores as they are stored."""
    return GlobalTopK().allocate({name: score.float() for name, score in scores.items()}, count)


def top_examples(scores: Mapping[int, float], count: int) -> list[int]:
    """The examples that the default rule takes."""
    values = torch.tensor(list(scores.values()), dtype=torch.float64)
    examples = ScoredExamples(torch.tensor(list(scores)), values, torch.ones(len(scores), dtype=torch.int64), [])
    return TopK().allocate(examples, count).tolist()


@pytest.fixture(scope="module")
def slow(inputs: Inputs) -> Slow:
    """The reference."""
    return Slow(inputs)


def run(inputs: Inputs, folder: Path, kind: str = "first order", **options: Any) -> Selection:
    """A float64 selection without a warm-up."""
    settings = {"parameter_budget": WEIGHTS, "data_budget": EXAMPLES, "dtype": "float64"}
    with float64_throughout():
        return select(inputs, folder, {**SGD, **settings, "scorer": SCORERS[kind], "step_size": STEPS[kind], **options})


def rows_of(selection: Selection) -> dict[int, float]:
    """Example id -> φ_i."""
    table = selection.examples.select(["example_id", "score"]).to_pydict()
    return {i: score for i, score in zip(*table.values(), strict=True) if score is not None}


def assert_mask(selection: Selection, expected: Mapping[str, Tensor]) -> None:
    """These weights are chosen and no others."""
    found = selection.mask()
    assert found.keys() == expected.keys()
    for name, mask in expected.items():
        assert torch.equal(found[name], mask), name


def assert_found(selection: Selection, expected: Expected) -> None:
    """Both scores and both choices are the loop's."""
    rows = rows_of(selection)
    assert rows.keys() == expected.rows.keys()
    for i, value in expected.rows.items():
        assert abs(rows[i] - value) <= TIGHT * expected.sizes[i]
    assert_same_gradients(selection.parameter_scores(), expected.weights, STORED)
    assert selection.example_ids == expected.chosen
    assert_mask(selection, expected.mask)


@pytest.mark.slow
@pytest.mark.parametrize("order", [PD, DP])
@pytest.mark.parametrize(("kind", "rounds"), [("first order", 1), ("first order", 3), ("fisher", 2), ("hessian", 3)])
def test_each_side_is_scored_by_the_other_as_last_chosen(
    inputs: Inputs, slow: Slow, tmp_path: Path, kind: str, order: str, rounds: int
) -> None:
    """Examples by u ⊙ m with the last u and m, weights with u and Σ_i g_i over the last examples, ḡ over these alone.

    The manifest tells how much each round kept, and the sums that agree are those of the last direction and the last
    examples.
    """
    expected = slow.alternate(kind, order, rounds)
    selection = run(inputs, tmp_path / "out", kind, order=order, rounds=rounds)
    assert_found(selection, expected)
    assert selection.manifest["rounds"] == expected.rounds
    assert [list(record) for record in selection.manifest["rounds"]] == [["round", *SIDES[order]]] * rounds
    identity = selection.manifest["sum_identity"]
    assert identity["row_sum"] == pytest.approx(expected.identity, rel=1e-9)
    assert identity["relative_difference"] < TIGHT
    if kind != "first order":
        assert selection.manifest["prediction"]["second_order_share"] > 0.05


@pytest.mark.parametrize("order", [PD, DP])
@pytest.mark.parametrize("kind", SCORERS)
def test_rounds_are_not_one_choice_over_again(slow: Slow, kind: str, order: str) -> None:
    """The second round of what is compared above chooses otherwise than the first, and a fixed side than none."""
    second = slow.alternate(kind, order, 2).rounds[1]
    assert min(second[side]["overlap"] for side in SIDES[order]) < 1
    u = slow.direction(kind, OK)
    examples = top_examples({i: inner(u, g) for i, g in slow.pool.items()}, EXAMPLES)
    mask = top_weights({name: u[name] * g for name, g in slow.sums(OK).items()}, WEIGHTS)
    once = slow.alternate(kind, order, 1)
    if order == PD:
        assert once.chosen != examples
    else:
        assert any(not torch.equal(once.mask[name], mask[name]) for name in mask)


@pytest.fixture(scope="module")
def single_shot(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Selection:
    """Both sides by one scoring."""
    return run(inputs, tmp_path_factory.mktemp("single") / "out")


def test_one_scoring_serves_both_sides(slow: Slow, single_shot: Selection) -> None:
    """In the order ``both`` φ_i and φ_j are those of one u over the whole pool, and no round is told of."""
    u = slow.direction("first order", OK)
    rows = {i: inner(u, g) for i, g in slow.pool.items()}
    sizes = {i: inner_size(u, g) for i, g in slow.pool.items()}
    weights = {name: u[name] * g for name, g in slow.sums(OK).items()}
    expected = Expected(rows, sizes, weights, top_weights(weights, WEIGHTS), top_examples(rows, EXAMPLES))
    assert_found(single_shot, expected)
    assert single_shot.manifest["rounds"] == []


@pytest.mark.parametrize("order", ["parameters", "data"])
def test_one_side_alone_takes_the_other_whole(
    inputs: Inputs, tmp_path: Path, single_shot: Selection, order: str
) -> None:
    """The scores are the single shot's to the bit, and so is the chosen side; the other's budget does not count."""
    selection = run(inputs, tmp_path / "out", order=order)
    scores = "parameter_scores.safetensors"
    assert (selection.folder / scores).read_bytes() == (single_shot.folder / scores).read_bytes()
    assert rows_of(selection) == rows_of(single_shot)
    everything = {name: torch.ones_like(mask) for name, mask in single_shot.mask().items()}
    assert selection.example_ids == (OK if order == "parameters" else single_shot.example_ids)
    assert_mask(selection, single_shot.mask() if order == "parameters" else everything)


@pytest.fixture(scope="module")
def one_round(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Selection]:
    """Order -> one side first, the other by it."""
    return {order: run(inputs, tmp_path_factory.mktemp(order) / "out", order=order) for order in (PD, DP)}


def test_the_side_that_is_chosen_first_is_the_single_shots(
    one_round: dict[str, Selection], single_shot: Selection
) -> None:
    """Weights before data are chosen by the whole pool, data before weights by all weights: nothing is known yet."""
    assert_mask(one_round[PD], single_shot.mask())
    assert_same_gradients(one_round[PD].parameter_scores(), single_shot.parameter_scores(), STORED)
    assert one_round[DP].example_ids == single_shot.example_ids
    assert rows_of(one_round[DP]) == pytest.approx(rows_of(single_shot), rel=1e-9)


@pytest.mark.parametrize("order", [PD, DP])
def test_where_everything_is_chosen_nothing_changes(inputs: Inputs, tmp_path: Path, order: str) -> None:
    """Without budgets each side is re-scored by all of the other, which is the single shot again, in any round."""
    budgets = {"parameter_budget": None, "data_budget": None}
    shot = run(inputs, tmp_path / "shot", "fisher", **budgets)
    again = run(inputs, tmp_path / "again", "fisher", order=order, rounds=2, **budgets)
    assert rows_of(again) == pytest.approx(rows_of(shot), rel=1e-9)
    assert_same_gradients(again.parameter_scores(), shot.parameter_scores(), STORED)
    second = again.manifest["rounds"][1]
    assert (second["parameters"]["overlap"], second["data"]["overlap"]) == (1.0, 1.0)


def test_the_last_direction_and_the_last_examples_are_what_must_agree(one_round: dict[str, Selection]) -> None:
    """After the examples, Σ φ_j over the chosen weights is Σ_i φ_i; after the weights, Σ_{i in S} φ_i is <u, Σ_S g>."""
    first, second = one_round[PD], one_round[DP]
    mask, scores = first.mask(), first.parameter_scores()
    chosen = math.fsum(float(scores[name][m].double().sum()) for name, m in mask.items())
    rows = math.fsum(rows_of(first).values())
    identity = first.manifest["sum_identity"]
    assert (identity["row_sum"], identity["column_sum"]) == pytest.approx((rows, rows), rel=1e-9)
    assert chosen == pytest.approx(rows, rel=STORED)
    # the weights' u is that of the examples, but for n
    of_weights = math.fsum(float(score.double().sum()) for score in second.parameter_scores().values())
    rows = math.fsum(rows_of(second)[i] for i in second.example_ids)
    identity = second.manifest["sum_identity"]
    assert (identity["row_sum"], identity["column_sum"]) == pytest.approx((rows, rows), rel=1e-9)
    assert of_weights * EXAMPLES / len(OK) == pytest.approx(rows, rel=STORED)


def other_weights(self: Passes, name: str, examples: int, loader: Any, **options: Any) -> GradientPass:
    """The rows of as many weights, but of others."""
    if us := options.get("directions"):
        options["directions"] = [{name: of.roll(1) for name, of in u.items()} for u in us]
    return RUN(self, name, examples, loader, **options)


def one_fewer(self: Passes, name: str, examples: int, loader: Any, **options: Any) -> GradientPass:
    """The sum over the pool's examples but one."""
    if name.startswith(("pool", "chosen")):
        loader = partial(loader.func, loader.args[0][1:])
    return RUN(self, name, examples, loader, **options)


RUN = Passes.run


@pytest.mark.parametrize("order", [PD, DP])
@pytest.mark.parametrize("wrong", [other_weights, one_fewer])
def test_rows_and_columns_of_other_things_are_refused(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str, wrong: Any
) -> None:
    """Rows by other weights than were chosen, or a sum over other examples, do not add up, and nothing is published."""
    monkeypatch.setattr(Passes, "run", wrong)
    with pytest.raises(UserError, match="The example scores add up to"):
        run(inputs, tmp_path / "out", order=order)
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "both", "rounds": 2}, r"model\.rounds is 2, but with model\.order both nothing is re-scored"),
        ({"order": "data", "rounds": 3}, r"model\.rounds is 3, but with model\.order data nothing is re-scored"),
        ({"order": PD, "rounds": 0}, r"model\.rounds is 0; give at least 1"),
        ({"order": "sideways"}, r"(?s)'sideways'.*both"),
    ],
)
def test_orders_that_contradict_themselves_are_refused(options: dict[str, Any], message: str) -> None:
    """Before anything is loaded, with key and value; or by the annotations, where these are checked at run time."""
    with pytest.raises((UserError, TypeError), match=message):
        SelectionModule("nowhere", **SGD, **options)


def test_weights_of_no_account_have_no_tap(
    inputs: Inputs, slow: Slow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one weight chosen, the pass over the examples touches its own modules alone, and the scores are right."""
    touched: set[nn.Module] = set()
    call = OutputTap.__call__

    def watched(tap: OutputTap, module: nn.Module, *rest: Any) -> Any:
        touched.add(module)
        return call(tap, module, *rest)

    monkeypatch.setattr(OutputTap, "__call__", watched)
    selection = run(inputs, tmp_path / "out", order=PD, parameter_budget=1)
    expected = slow.alternate("first order", PD, 1, weights=1)
    assert_found(selection, expected)
    (name,) = (name for name, mask in expected.mask.items() if mask.any())
    shape = expected.mask[name].shape
    assert touched
    assert all(module.get_parameter("weight").shape == shape for module in touched)
    assert len(touched) == (2 if name == "model.embed_tokens.weight" else 1)


class ForLongTexts(nn.Module):
    """A layer with an addition that short batches do without, as an expert that no token is sent to."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.addition = layer, nn.Linear(width, width, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, and the addition's for more than eight tokens."""
        return self.layer(x) + self.addition(x) if x.shape[1] > 8 else self.layer(x)


@pytest.mark.parametrize("columns", [False, True])
def test_a_batch_without_any_chosen_weight_scores_nothing(columns: bool) -> None:
    """Where none of the modules that have chosen weights runs, the examples score zero, as their gradient says."""
    model, examples = make("llama"), make_examples((13, 9, 4, 5))
    layer = model.model.layers[0]
    layer.mlp = ForLongTexts(layer.mlp, 16)
    name = "model.layers.0.mlp.addition.weight"
    u = {name: random_direction(model)[name]}
    gradients = [{name: g[name]} for g in gradient_loop(model, examples)]
    assert [bool(g[name].any()) for g in gradients] == [True, True, False, False]
    batches = [collate(examples[:2], [0, 1]), collate(examples[2:], [2, 3])]
    found = gradient_pass(model, given(batches), directions=[u], columns=columns)
    assert_rows([found.rows[0][k] for k in range(4)], u, gradients, 1e-6)


@pytest.mark.parametrize("by", ["magnitude", "signed"])
def test_in_reverse_the_lowest_scores_win(inputs: Inputs, tmp_path: Path, single_shot: Selection, by: Any) -> None:
    """The same scores as ever, of which the chosen are the lowest."""
    allocators: dict[str, Any] = {
        "parameter_allocator": GlobalTopK(by, reverse=True),
        "data_allocator": TopK(reverse=True),
    }
    selection = run(inputs, tmp_path / "out", **allocators)
    rows = rows_of(selection)
    assert rows == rows_of(single_shot)
    assert selection.example_ids == sorted(sorted(rows, key=lambda i: rows[i])[:EXAMPLES])
    scores, mask = selection.parameter_scores(), selection.mask()
    values, chosen = (torch.cat([of[name].flatten() for name in sorted(scores)]) for of in (scores, mask))
    ranked = values.abs() if by == "magnitude" else values
    assert int(chosen.sum()) == WEIGHTS
    assert float(ranked[chosen].max()) <= float(ranked[~chosen].min())
    torch.testing.assert_close(ranked[chosen].sort().values, ranked.sort().values[:WEIGHTS], rtol=0, atol=0)


BAD = [0, 3]
"""The only ones with these letters: a 4, a P."""
GOOD = [i for i in OK if i not in BAD]
FIRST, CHOSEN, LAST = 2 * len(OK), EXAMPLES, len(GOOD)
"""Examples that pass: the pool, begun anew once the bad ones are met; the chosen ones; the pool without the bad."""
PASSED = {
    ("first order", PD): {"pool gradient": FIRST, "scores": LAST},
    ("first order", DP): {"scores": FIRST, "chosen examples gradient": CHOSEN},
    ("pool aware", DP): {"pool gradient": FIRST, "scores": LAST, "chosen examples gradient": CHOSEN},
}
AGAIN = {"scores, round 2": LAST, "chosen examples gradient, round 2": CHOSEN}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "order", "rounds"), [*((kind, order, 2) for kind, order in PASSED), ("first order", DP, 1)]
)
def test_what_is_not_finite_is_left_out_of_every_pass(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, order: str, rounds: int
) -> None:
    """Found in the first pass over the pool, it is in no later one, and scores and choices are those without it.

    A first-order u that is made before the first pass is over as many examples as there seem to be, so that the scores
    of that pass are smaller by a factor.
    """
    rest = write_jsonl(tmp_path / "rest.jsonl", [line for i, line in enumerate(LINES) if i not in BAD])
    scorer = PoolAware() if kind == "pool aware" else FirstOrder()
    options: dict[str, Any] = {"scorer": scorer, "order": order, "rounds": rounds}
    expected = run(replace(inputs, train=rest), tmp_path / "rest", **options)
    monkeypatch.setattr("tests.world.jobs.SelectionModule", poisoned_by(gradient="4", loss="P"))
    found = run(inputs, tmp_path / "all", **options)
    assert [i for i, status in enumerate(found.examples["status"].to_pylist()) if status == "nonfinite"] == BAD
    rows = rows_of(found)
    assert list(rows) == GOOD
    factor = len(GOOD) / len(OK) if (kind, order, rounds) == ("first order", DP, 1) else 1.0
    assert list(rows.values()) == pytest.approx([factor * score for score in rows_of(expected).values()], rel=1e-9)
    assert_same_gradients(found.parameter_scores(), expected.parameter_scores(), STORED)
    assert [record["prompt"] for record in found.records] == [record["prompt"] for record in expected.records]
    assert_mask(found, expected.mask())
    assert found.manifest["sum_identity"]["relative_difference"] < TIGHT
    passed = {phase["name"]: phase["examples"] for phase in found.manifest["phases"]}
    due = {"validation gradient": len(VALIDATION), **PASSED[kind, order], **(AGAIN if rounds == 2 else {})}
    if order == DP and rounds == 2 and found.manifest["rounds"][1]["data"]["overlap"] == 1:
        del due["chosen examples gradient, round 2"]  # the same examples have the same sum
    assert passed == due


@pytest.mark.slow
@pytest.mark.parametrize("order", [PD, DP])
def test_a_run_of_two_rounds_goes_on_from_any_pass(inputs: Inputs, tmp_path: Path, order: str) -> None:
    """Killed at each of its passes in turn, it repeats none that was finished, and leaves an unbroken run's bytes."""
    options = {**SGD, "scorer": HessianVector(), "step_size": STEPS["hessian"], "order": order, "rounds": 2}
    unbroken = select(inputs, tmp_path / "unbroken", options)
    names = [phase["name"] for phase in unbroken.manifest["phases"]]
    assert len(set(names)) == len(names)
    for number in range(len(names)):
        resumed = number > 0
        killed_run(inputs, tmp_path / "out", options, passes, "gradient_pass", 1 + resumed, resume=resumed)
    finished = select(inputs, tmp_path / "out", options, resume=True)
    assert contents(finished.folder) == contents(unbroken.folder)
    assert [phase["name"] for phase in finished.manifest["phases"]] == names


def test_what_turns_out_late_not_to_be_finite_is_chosen_no_more(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chosen example whose row was finite, but whose gradient is not, makes place for the next best."""
    options = {**SGD, "order": DP, "data_budget": 3}
    before = select(inputs, tmp_path / "before", options)
    bad = before.example_ids[0]

    def late(self: Passes, name: str, examples: int, loader: Any, **options: Any) -> Any:
        if not name.startswith("chosen"):
            return RUN(self, name, examples, loader, **options)
        ids = loader.args[0].tolist()
        found = RUN(self, name, examples, partial(loader.func, [i for i in ids if i != bad]), **options)
        found.nonfinite |= {bad} & set(ids)
        return found

    monkeypatch.setattr(Passes, "run", late)
    after = select(inputs, tmp_path / "after", options)
    table = after.examples.to_pydict()
    assert (table["status"][bad], table["score"][bad], table["selected"][bad]) == ("nonfinite", None, False)
    assert set(before.example_ids) - {bad} < set(after.example_ids)
    assert len(after.example_ids) == 3
