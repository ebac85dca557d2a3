from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr

from dualsft.errors import UserError
from dualsft.models.loading import load_model
from dualsft.paths import TargetPath
from dualsft.scorers import HessianVector
from dualsft.selection import Selection, Warmup, passes, stability
from dualsft.selection.paths.settings import PathSettings
from dualsft.selection.prior import Prior
from dualsft.selection.settings import SelectionSettings
from dualsft.selection.summary import summary
from tests.references import float64_throughout, gradient_loop, inner, total
from tests.world.data import LINES, VALIDATION, sums
from tests.world.faults import killed_run
from tests.world.jobs import SGD, Inputs, contents, select, write_inputs

HALVES: dict[str, Any] = {**SGD, "stability": True, "dtype": "float64", "step_size": 0.3}


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A validation set of five rows, and a pool in which no row stands twice: rounding would order their scores."""
    return write_inputs(tmp_path_factory.mktemp("inputs"), dict.fromkeys(LINES), sums(5))


def ranks_by_halves(inputs: Inputs, seed: int) -> tuple[float, float]:
    """Spearman's correlation of both sides' scores between halves, by a loop of autograd over examples in float64."""
    model = load_model(inputs.model, "float64").eval()
    target = inputs.examples("validation")
    ids = list(target)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed)).tolist()
    gradients = gradient_loop(model, inputs.examples("train").values())
    rows, weights = [], []
    for half in (order[::2], order[1::2]):
        u = total(gradient_loop(model, [target[ids[k]] for k in half]))
        rows.append([inner(u, g) for g in gradients])
        weights.append(torch.cat([(u[name] * g).flatten() for name, g in sorted(total(gradients).items())]))
    return spearmanr(*rows).statistic, spearmanr(*weights).statistic


@pytest.mark.parametrize("sampled", [2**20, 3000], ids=["all weights", "some weights"])
def test_halves_agree_as_a_loop_over_examples_says(
    several: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampled: int
) -> None:
    """Both correlations are those of u = v of either half; from a sample of the weights nearly so."""
    monkeypatch.setattr(stability, "_SAMPLED", sampled)
    with float64_throughout():
        found = select(several, tmp_path / "out", HALVES, seed=3).diagnostics.basis.stability
    assert found is not None
    rows, weights = ranks_by_halves(several, 3)
    assert found.examples == pytest.approx(rows)
    assert found.parameters == pytest.approx(weights, abs=1e-3 if sampled > 3000 else 0.1)


def scores(selection: Selection) -> list[float]:
    """φ_i of the examples that have one."""
    return [score for score in selection.examples["score"].to_pylist() if score is not None]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"token_scores": True, "normalize": "gradient_norm"},
        {"scorer": HessianVector(), "order": "parameters_then_data", "rounds": 2},
    ],
    ids=["first order", "second order, by turns"],
)
def test_the_scores_are_those_without_halves(several: Inputs, tmp_path: Path, options: dict[str, Any]) -> None:
    """The option adds what it tells and changes no choice; no pass over the pool is made for it."""
    data = {"validation": {"a": several.validation, "b": several.train}}
    without, found = (
        select(several, tmp_path / str(halves), {**HALVES, **options, "stability": halves}, data)
        for halves in (False, True)
    )
    assert scores(found) == pytest.approx(scores(without), rel=1e-4, abs=1e-9)
    assert found.example_ids == without.example_ids
    assert without.diagnostics.basis.stability is None
    agreed = found.diagnostics.basis.stability
    assert agreed is not None
    assert -1 <= agreed.examples <= 1  # type: ignore[operator]
    told = (
        f"stability   rank correlation of the scores by two halves of the validation set: {agreed.examples:.2f} of the"
    )
    assert told in summary(found)
    over_pool = [[p.name for p in of.about.phases if not p.name.startswith("validation")] for of in (found, without)]
    assert over_pool[0] == over_pool[1]


def test_contradictions_are_refused(tmp_path: Path) -> None:
    """Along a path, and where a set has no halves; before anything is written."""
    with pytest.raises(UserError, match=r"model\.stability is set, but .* not along a path"):
        SelectionSettings(stability=True, path=PathSettings(along=TargetPath()))
    single = write_inputs(tmp_path / "in", LINES, VALIDATION[:1])
    with pytest.raises(UserError, match=r"halves of data\.validation, which has a single example"):
        select(single, tmp_path / "out", {**SGD, "stability": True})
    assert not (tmp_path / "out").exists()


def test_a_killed_run_tells_the_same(several: Inputs, tmp_path: Path) -> None:
    """Byte for byte, where both halves' gradients come from files."""
    options = {**SGD, "prior": Prior(weight=0.5, fraction=0.5), "warmup": Warmup(fraction=0.5), "stability": True}
    killed_run(several, tmp_path / "killed", options, passes, "gradient_pass", 4)
    select(several, tmp_path / "killed", options, resume=True)
    select(several, tmp_path / "whole", options)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
