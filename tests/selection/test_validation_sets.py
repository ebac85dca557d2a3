"""Several validation sets: each has the scores that it has alone, and the combination of them decides."""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dualsft.errors import UserError
from dualsft.matrix.passes import gradient_pass
from dualsft.scorers import DiagonalFisher, HessianVector, Scorer
from dualsft.selection import Selection
from tests.cases import Gradients, collate, given, make, make_examples, pack, random_direction
from tests.references import assert_same_gradients
from tests.world.data import OK, write_jsonl
from tests.world.jobs import SGD, Inputs, select

SETS = {
    "sums": ['{"prompt": "What is 1 + 1?", "response": "2, of course."}', '{"prompt": "1, 2,", "response": "3, 4"}'],
    "towns": [
        '{"prompt": "Rome", "response": "is the capital of Italy."}',
        '{"prompt": "", "response": ""}',
        '{"prompt": "The lake?", "response": "Deep and cold."}',
        '{"prompt": "Oslo", "response": "lies by a fjord."}',
    ],
}
SIZES = {"sums": 2, "towns": 3}
"""Examples with a response."""
COMBINE: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda values: values.mean(0),
    "max": lambda values: values.amax(0),
    "min": lambda values: values.amin(0),
}
SAME = 1e-9
"""How near two float64 passes are whose batches or directions are put together otherwise, relative to the largest."""
STORED = 1e-6
"""The same where scores are stored in float32."""
OPTIONS: dict[str, Any] = {**SGD, "dtype": "float64", "step_size": 0.5, "token_scores": True}


def select_on(inputs: Inputs, validation: str | dict[str, str], folder: Path, options: dict[str, Any]) -> Selection:
    """A selection by another validation set, or by several by name."""
    return select(inputs, folder, options, {"validation": validation})


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Set name -> its file."""
    folder = tmp_path_factory.mktemp("sets")
    return {name: write_jsonl(folder / f"{name}.jsonl", lines) for name, lines in SETS.items()}


@pytest.fixture(scope="module")
def apart(inputs: Inputs, sources: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Selection]:
    """Set name -> a selection by that set alone."""
    folder = tmp_path_factory.mktemp("apart")
    return {name: select_on(inputs, path, folder / name, OPTIONS) for name, path in sources.items()}


Together = Callable[[str], Selection]


@pytest.fixture(scope="module")
def together(inputs: Inputs, sources: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Together:
    """Combination -> a selection by both sets."""

    @cache
    def run(combination: str) -> Selection:
        folder = tmp_path_factory.mktemp("together") / combination
        return select_on(inputs, sources, folder, {**OPTIONS, "combination": combination})

    return run


def column(selection: Selection, name: str = "score") -> Tensor:
    """The scores of the examples that have any."""
    values = selection.examples[name].to_pylist()
    assert [i for i, value in enumerate(values) if value is not None] == OK
    return torch.tensor([values[i] for i in OK], dtype=torch.float64)


def assert_same(found: Tensor, expected: Tensor, relative: float = SAME) -> None:
    """Equal up to a fraction of the largest."""
    torch.testing.assert_close(found, expected, rtol=0.0, atol=relative * float(expected.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("combination", COMBINE)
def test_each_set_has_the_scores_that_it_has_alone(
    together: Together, apart: dict[str, Selection], combination: str
) -> None:
    """Its column is the ``score`` of a run on it; ``score`` is the columns combined, of which neither decides all."""
    selection = together(combination)
    for name, alone in apart.items():
        assert_same(column(selection, f"score_{name}"), column(alone))
    columns = torch.stack([column(selection, f"score_{name}") for name in SETS])
    assert 0 < int((columns[0] > columns[1]).sum()) < len(OK)
    assert_same(column(selection), COMBINE[combination](columns), 1e-15)


@pytest.mark.parametrize("combination", COMBINE)
def test_weights_scores_are_combined_entry_by_entry(
    together: Together, apart: dict[str, Selection], combination: str
) -> None:
    """Each weight's score is the mean, the largest or the smallest of its scores by either set alone."""
    alone = [selection.parameter_scores() for selection in apart.values()]
    expected = {name: COMBINE[combination](torch.stack([of[name] for of in alone])) for name in alone[0]}
    assert_same_gradients(together(combination).parameter_scores(), expected, STORED)


@pytest.mark.parametrize("combination", COMBINE)
def test_choices_follow_the_combined_scores(together: Together, combination: str) -> None:
    """With the default rules the chosen have the highest scores, of examples and, by magnitude, of weights."""
    selection = together(combination)
    best = max(OK, key=lambda i: selection.examples["score"].to_pylist()[i])
    assert selection.example_ids == [best]  # a tenth of the nine, but never none
    scores, mask = selection.parameter_scores(), selection.mask()
    values, chosen = (torch.cat([of[name].flatten() for name in sorted(scores)]) for of in (scores, mask))
    assert int(chosen.sum()) == selection.manifest["counts"]["parameters"]["selected"] > 0
    assert float(values[chosen].abs().min()) >= float(values[~chosen].abs().max())


def test_a_mapping_of_one_set_has_a_column_of_its_own(
    inputs: Inputs, sources: dict[str, str], apart: dict[str, Selection], tmp_path: Path
) -> None:
    """It is the ``score``, which is that of the same source without a name; that has no further column."""
    named = select_on(inputs, {"towns": sources["towns"]}, tmp_path / "out", OPTIONS)
    columns = apart["towns"].examples.column_names
    assert not any(name.startswith("score_") for name in columns)
    assert named.examples.column_names == [*columns, "score_towns"]
    assert named.examples["score_towns"].to_pylist() == named.examples["score"].to_pylist()
    assert named.examples["score"].to_pylist() == apart["towns"].examples["score"].to_pylist()


def test_all_sets_share_one_pass_over_the_pool(together: Together) -> None:
    """Each set's gradient is a pass over that set, and every row comes from one pass over the pool."""
    phases = [(phase["name"], phase["examples"]) for phase in together("mean").manifest["phases"]]
    assert phases == [
        ("validation gradient of sums", SIZES["sums"]),
        ("validation gradient of towns", SIZES["towns"]),
        ("scores", len(OK)),
    ]


@pytest.mark.parametrize("combination", COMBINE)
def test_token_scores_add_up_to_the_combined_score(together: Together, combination: str) -> None:
    """Whatever decides an example's score, its tokens share that."""
    selection = together(combination)
    assert selection.token_scores is not None
    assert selection.token_scores["example_id"].to_pylist() == OK
    sums = torch.tensor([math.fsum(row) for row in selection.token_scores["score"].to_pylist()], dtype=torch.float64)
    assert_same(sums, column(selection), 1e-12)


@pytest.mark.parametrize("combination", COMBINE)
def test_the_manifest_tells_of_each_set(together: Together, apart: dict[str, Selection], combination: str) -> None:
    """Its data, the two sums that must agree, and its prediction are those of a run on it alone, whatever combines.

    The sums are those of its column, and the prediction of a step with all weights on the whole pool is that sum.
    """
    manifest = together(combination).manifest
    assert manifest["combination"] == combination
    assert list(manifest["data"]["validation"]) == list(SETS)
    identities, predictions = manifest["sum_identity"]["sets"], manifest["prediction"]["sets"]
    assert list(identities) == list(predictions) == list(SETS)
    for name, selection in apart.items():
        alone = selection.manifest
        assert manifest["data"]["validation"][name] == alone["data"]["validation"]
        summed = math.fsum(column(together(combination), f"score_{name}").tolist())
        assert identities[name]["row_sum"] == pytest.approx(summed, rel=1e-12)
        assert identities[name]["column_sum"] == pytest.approx(summed, rel=SAME)
        assert predictions[name]["predicted_improvement"] == pytest.approx(summed, rel=SAME)
        expected = {key: pytest.approx(of, rel=SAME) for key, of in alone["prediction"].items() if of is not None}
        assert {key: of for key, of in predictions[name].items() if of is not None} == {
            key: of for key, of in expected.items() if key != "step_size"
        }
    worst = max(identities.values(), key=lambda of: of["relative_difference"])
    assert {key: of for key, of in manifest["sum_identity"].items() if key != "sets"} == worst
    slopes = [of["slope"] for of in predictions.values()]
    assert manifest["prediction"]["slope"] == pytest.approx(sum(slopes) / 2, rel=1e-12)


def test_a_single_source_is_told_of_without_a_name(apart: dict[str, Selection]) -> None:
    """There is nothing to tell apart."""
    manifest = apart["sums"].manifest
    assert "sets" not in manifest["sum_identity"]
    assert "sets" not in manifest["prediction"]
    assert manifest["data"]["validation"]["rows"] == 2


SECOND_ORDER: dict[str, tuple[Scorer, float]] = {
    "fisher": (DiagonalFisher("empirical_fisher"), 20.0),
    "hessian": (HessianVector(), 0.2),
}
"""The scorer and a step at which its second-order term counts."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", SECOND_ORDER)
def test_second_order_sets_have_the_scores_that_they_have_alone(
    inputs: Inputs, sources: dict[str, str], tmp_path: Path, kind: str
) -> None:
    """Each set has its own curvature; the manifest's prediction is of each, and the mean of them."""
    scorer, step_size = SECOND_ORDER[kind]
    options = {**OPTIONS, "scorer": scorer, "step_size": step_size, "token_scores": False}
    both = select_on(inputs, sources, tmp_path / "both", options)
    alone = {name: select_on(inputs, path, tmp_path / name, options) for name, path in sources.items()}
    for name, selection in alone.items():
        assert_same(column(both, f"score_{name}"), column(selection))
        told, expected = both.manifest["prediction"]["sets"][name], selection.manifest["prediction"]
        assert told == {key: pytest.approx(expected[key], rel=1e-6) for key in told}
        assert told["second_order_share"] > 0.05
    scores = torch.stack([column(both, f"score_{name}") for name in sources])
    assert_same(column(both), scores.mean(0), 1e-15)
    weights = [selection.parameter_scores() for selection in alone.values()]
    expected = {name: torch.stack([of[name] for of in weights]).mean(0) for name in weights[0]}
    assert_same_gradients(both.parameter_scores(), expected, STORED)
    passed = [phase["name"] for phase in both.manifest["phases"]]
    assert (passed.count("pool gradient"), passed.count("scores")) == (1, 1)


@pytest.mark.slow
def test_the_auto_step_minimises_the_mean_of_the_quadratics(
    inputs: Inputs, sources: dict[str, str], tmp_path: Path
) -> None:
    """It is mean slope over mean curvature, and every score is that of a run with this number."""
    scorer = DiagonalFisher("empirical_fisher")
    options = {**OPTIONS, "scorer": scorer, "token_scores": False}
    auto = select_on(inputs, sources, tmp_path / "auto", {**options, "step_size": "auto"})
    alone = [select_on(inputs, path, tmp_path / name, options).manifest["prediction"] for name, path in sources.items()]
    step_size = sum(of["slope"] for of in alone) / sum(of["curvature"] for of in alone)
    own = [of["slope"] / of["curvature"] for of in alone]
    assert min(own) < 0.99 * step_size < 0.98 * max(own)  # the sets would have it otherwise each
    assert auto.manifest["step_size"] == "auto"
    assert auto.manifest["prediction"]["step_size"] == pytest.approx(step_size, rel=1e-6)
    by_number = select_on(inputs, sources, tmp_path / "number", {**options, "step_size": step_size})
    for name in ("score", *(f"score_{name}" for name in sources)):
        assert_same(column(auto, name), column(by_number, name), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["parameters_then_data", "data_then_parameters"])
def test_a_fixed_side_is_one_for_all_sets(inputs: Inputs, sources: dict[str, str], tmp_path: Path, order: str) -> None:
    """The combined scores choose it, each set re-scores by it, and the sums of each set agree over it."""
    options = {**OPTIONS, "token_scores": False, "order": order, "data_budget": 3, "parameter_budget": 500}
    selection = select_on(inputs, sources, tmp_path / "out", options)
    first_side = select_on(inputs, sources, tmp_path / "both", {**options, "order": "both"})
    columns = {name: column(selection, f"score_{name}") for name in sources}
    if order == "parameters_then_data":
        assert all(torch.equal(mask, first_side.mask()[name]) for name, mask in selection.mask().items())
        summed = {name: math.fsum(of.tolist()) for name, of in columns.items()}
    else:
        assert selection.example_ids == first_side.example_ids
        places = [OK.index(i) for i in selection.example_ids]
        summed = {name: math.fsum(of[places].tolist()) for name, of in columns.items()}
    assert_same(column(selection), torch.stack(list(columns.values())).mean(0), 1e-15)
    for name, identity in selection.manifest["sum_identity"]["sets"].items():
        assert identity["row_sum"] == pytest.approx(summed[name], rel=1e-9)
        assert identity["relative_difference"] < SAME


@pytest.mark.parametrize("empty", SETS)
def test_an_empty_set_is_named(inputs: Inputs, sources: dict[str, str], tmp_path: Path, empty: str) -> None:
    """One set without a response to validate on is enough to refuse, and no folder is made."""
    path = write_jsonl(
        tmp_path / "empty.jsonl", ['{"prompt": "a", "response": ""}', '{"prompt": "b", "response": " "}']
    )
    with pytest.raises(
        UserError, match=rf"No example of data\.validation\.{empty} has a response .*0 ok, 2 empty, 0 truncated"
    ):
        select_on(inputs, {**sources, empty: path}, tmp_path / "out", SGD)
    assert not (tmp_path / "out").exists()


EXAMPLES = make_examples()
LAYOUTS = {"padded": collate(EXAMPLES), "packed": pack([[0, 3, 1], [2], [4]], EXAMPLES)}


BREAK_EVEN = {"by gradient": (0.0, 0.0), "by product": (1e9, 0.0)}
"""What makes linear layers take one way to the rows, whatever the lengths."""
WAYS: list[tuple[str, bool, bool]] = [
    ("by gradient", True, False),
    *(("by product", columns, by_token) for columns in (False, True) for by_token in (False, True)),
]
"""Only rows of whole examples that come with columns have more ways than one."""


PASSES = [
    (architecture, list(LAYOUTS)[(row + column) % 2], *way)
    for row, architecture in enumerate(("llama tied", "gpt2", "mixtral"))
    for column, way in enumerate(WAYS)
]
"""Every architecture each way, and with each of these either layout."""


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "layout", "way", "columns", "by_token"), PASSES)
def test_rows_of_several_directions_are_those_of_each(
    architecture: str, layout: str, way: str, columns: bool, by_token: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass for two u gives each its rows and tokens in a pass of its own, and the columns once."""
    monkeypatch.setattr("dualsft.matrix.linear_tap._BREAK_EVEN", {"cpu": BREAK_EVEN[way], "cuda": BREAK_EVEN[way]})
    model, batch = make(architecture), LAYOUTS[layout]
    us: list[Gradients] = [random_direction(model, seed) for seed in (2, 3)]
    options: dict[str, Any] = {"columns": columns, "by_token": by_token}
    found = gradient_pass(model, given([batch]), directions=us, **options)
    each = [gradient_pass(model, given([batch]), directions=[u], **options) for u in us]
    assert (len(found.rows), found.counted) == (2, len(EXAMPLES))
    largest = max(abs(value) for rows in found.rows for value in rows.values())
    for rows, alone in zip(found.rows, each, strict=True):
        # float64 but for norms, whose float32 is the same in both
        assert rows == pytest.approx(alone.rows[0], rel=0, abs=1e-12 * largest)
    assert len(found.tokens) == (2 if by_token else 0)
    for tokens, alone in zip(found.tokens, each, strict=False):
        assert tokens.keys() == alone.tokens[0].keys()
        for i, values in tokens.items():
            torch.testing.assert_close(values, alone.tokens[0][i], rtol=0, atol=1e-12 * largest)
    assert bool(found.sums) == columns
    if columns:
        assert_same_gradients(found.sums, each[0].sums, 1e-12)
