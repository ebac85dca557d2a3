"""Scorers, terms and allocators that may be anybody's: whatever they do wrong is told as theirs, in one sentence."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dualsft import DataAllocator, Objective, ParameterAllocator, SelectionModule
from dualsft.allocators import ScoredExamples
from dualsft.errors import UserError
from dualsft.scorers import ParameterStatistics, Scorer, SecondOrderScorer
from dualsft.selection import passes
from tests.world.faults import killed_run
from tests.world.jobs import ADAM, SGD, Inputs, select

FIRST = r"model\.embed_tokens\.weight"


class OddScorer(Scorer):
    """Gives, or does, something odd."""

    needs = ("pool_gradient", "second_moment")

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def direction(self, statistics: ParameterStatistics) -> Any:
        """By kind."""
        v = statistics.validation_gradient
        if self.kind == "weight":
            statistics.weight.mul_(0.5)
        if self.kind == "raise":
            raise AttributeError("'Tensor' object has no attribute 'fail'")
        return {"none": lambda: None, "integers": v.long, "weight": v.clone}[self.kind]()


class OddCurvature(SecondOrderScorer):
    """Gives an odd curvature."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def curvature(self, statistics: ParameterStatistics) -> Any:
        """By kind."""
        s = statistics
        assert s.pool_gradient is not None  # though not asked for
        kinds = {"number": s.pool_gradient.sum(), "none": None, "step": s.pool_gradient * s.step_size}
        return kinds[self.kind]


class OddTerm(Objective):
    """Draws, or loses, something odd."""

    name = "odd"

    def __init__(self, kind: str, weight: Any = 1.0) -> None:
        self.kind, self.weight = kind, weight

    def draw(self, pool: Any, seed: int) -> Any:
        """All."""
        if self.kind == "draw":
            raise KeyError("pool")
        return torch.tensor(pool)

    def losses(self, model: Any, batch: Any, layout: Any, teacher: Any) -> Any:
        """By kind."""
        losses = layout.by_example(model(batch["input_ids"]).logits.logsumexp(2)).mean(1)
        kinds: dict[str, Any] = {
            "fewer": losses[1:],
            "column": losses[:, None],
            "number": losses.sum(),
            "none": None,
            "constant": losses.detach(),
            "integers": losses.long(),
        }
        return kinds[self.kind] if self.kind in kinds else teacher(batch["input_ids"])


class OddWeights(ParameterAllocator):
    """Chooses in an odd way."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def allocate(self, scores: Mapping[str, Tensor], budget: int) -> Any:
        """By kind."""
        if self.kind == "raise":
            raise ZeroDivisionError
        if self.kind == "exit":
            raise SystemExit(0)
        if self.kind == "in NumPy":
            next(iter(scores.values())).numpy().fill(0)
        if self.kind == "in place":
            for score in scores.values():
                score.zero_()
        return {"none": None}.get(self.kind, {name: torch.zeros(()) for name in scores})


class OddExamples(DataAllocator):
    """Chooses in an odd way."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def allocate(self, examples: ScoredExamples, budget: int) -> Any:
        """By kind."""
        ids = examples.example_id
        return {"none": None, "matrix": ids[:, None].expand(-1, 2), "list": ids[:budget].tolist()}[self.kind]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {**ADAM, "scorer": OddScorer("raise")},
            r"OddScorer\.direction failed \(AttributeError: .*\); mend tests\.",
        ),
        (
            {**ADAM, "scorer": OddScorer("none")},
            rf"OddScorer gave {FIRST} a direction that is a NoneType, where a tensor",
        ),
        (
            {**ADAM, "scorer": OddScorer("integers")},
            rf"OddScorer gave {FIRST} a direction of torch\.int64 and shape",
        ),
        ({**ADAM, "scorer": OddScorer("weight")}, rf"scorer modified the weight {FIRST} in place"),
        (
            {**SGD, "scorer": OddCurvature("number")},
            rf"OddCurvature gave {FIRST} a curvature of torch\.float32 and shape \(\), where a tensor",
        ),
        (
            {**SGD, "scorer": OddCurvature("none")},
            rf"OddCurvature gave {FIRST} a curvature that is a NoneType",
        ),
        (
            {**SGD, "scorer": OddCurvature("step")},
            rf"OddCurvature gave {FIRST} a curvature that is not finite",
        ),
        ({**SGD, "objectives": [OddTerm("draw")]}, r"OddTerm\.draw failed \(KeyError: 'pool', at "),
        ({**SGD, "objectives": [OddTerm("fewer")]}, r"OddTerm\.losses gave \(\d+,\) for \d+ examples"),
        ({**SGD, "objectives": [OddTerm("column")]}, r"OddTerm\.losses gave \(\d+, 1\) for \d+ examples"),
        ({**SGD, "objectives": [OddTerm("number")]}, r"OddTerm\.losses gave \(\) for \d+ examples"),
        ({**SGD, "objectives": [OddTerm("none")]}, r"OddTerm\.losses gave NoneType for \d+ examples"),
        ({**SGD, "objectives": [OddTerm("integers")]}, r"OddTerm\.losses gave .* must give a floating tensor"),
        ({**SGD, "objectives": [OddTerm("constant")]}, r"OddTerm\.losses gave losses that depend on no weight"),
        ({**SGD, "objectives": [OddTerm("teacher")]}, r"OddTerm\.losses failed \(TypeError: 'NoneType'"),
        ({**SGD, "objectives": [OddTerm("fewer", "heavy")]}, r"OddTerm\.name, or weight, failed \(TypeError"),
        ({**SGD, "objectives": [OddTerm("fewer", float("nan"))]}, "OddTerm has the weight nan"),
        ({**SGD, "parameter_allocator": OddWeights("raise")}, r"OddWeights\.allocate failed \(ZeroDivisionError"),
        ({**SGD, "parameter_allocator": OddWeights("none")}, "OddWeights gave back a NoneType, not a mapping"),
        ({**SGD, "parameter_allocator": OddWeights("in place")}, "OddWeights modified the scores in place"),
        ({**SGD, "parameter_allocator": OddWeights("in NumPy")}, "OddWeights modified the scores in place"),
        ({**SGD, "parameter_allocator": OddWeights("exit")}, r"OddWeights\.allocate failed \(SystemExit: 0, at "),
        ({**SGD, "parameter_allocator": OddWeights("shape")}, "OddWeights gave a tensor of torch.float32"),
        ({**SGD, "data_allocator": OddExamples("none")}, "OddExamples gave back a NoneType"),
        ({**SGD, "data_allocator": OddExamples("matrix")}, r"OddExamples gave back a tensor of .* shape \[8, 2\]"),
    ],
)
def test_what_a_stranger_does_wrong_is_told_as_his(
    inputs: Inputs, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    """With the class and the method, whatever was raised, given or modified; and nothing is published."""
    with pytest.raises(UserError, match=message):
        select(inputs, tmp_path / "out", options)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_list_of_ids_will_do(inputs: Inputs, tmp_path: Path) -> None:
    """A data allocator may give its choice as it likes."""
    options = {**SGD, "data_allocator": OddExamples("list"), "data_budget": 3}
    assert select(inputs, tmp_path / "out", options).example_ids == [0, 2, 4]


class Spoiling(Scorer):
    """Modifies all that it is given but the weights."""

    needs = ("pool_gradient", "second_moment")

    def __init__(self, spoil: bool) -> None:
        self.spoil = spoil

    def direction(self, statistics: ParameterStatistics) -> Tensor:
        """V over the root of ĉ."""
        s = statistics
        assert s.second_moment is not None
        assert s.pool_gradient is not None
        u = s.preconditioner * (s.validation_gradient - s.pool_gradient)
        if self.spoil:
            for given in (s.second_moment, s.pool_gradient, s.preconditioner, s.validation_gradient):
                given.mul_(4)
        return u


@pytest.mark.slow
def test_what_a_scorer_is_given_is_its_own(inputs: Inputs, tmp_path: Path) -> None:
    """Statistics that it modifies spoil nothing, in any round."""
    options = {**ADAM, "order": "data_then_parameters", "rounds": 2}
    clean, spoilt = (
        select(inputs, tmp_path / f"{spoil}", {**options, "scorer": Spoiling(spoil)}) for spoil in (False, True)
    )
    for name in ("examples.parquet", "parameter_scores.safetensors", "mask.safetensors"):
        assert (clean.folder / name).read_bytes() == (spoilt.folder / name).read_bytes()


class Private(OddTerm):
    """Keeps an option under a private name."""

    def __init__(self, share: int) -> None:
        super().__init__("private")
        self._share = share

    def losses(self, model: Any, batch: Any, layout: Any, teacher: Any) -> Tensor:
        """A share."""
        return layout.by_example(model(batch["input_ids"]).logits.logsumexp(2)).mean(1) / self._share


def test_options_under_private_names_count(inputs: Inputs, tmp_path: Path) -> None:
    """A run is not resumed with other ones, which its finished passes do not know."""
    killed_run(inputs, tmp_path / "out", {**SGD, "objectives": [Private(2)]}, passes, "gradient_pass", 3)
    with pytest.raises(UserError, match=r"with other settings \(objectives\)"):
        select(inputs, tmp_path / "out", {**SGD, "objectives": [Private(3)]}, resume=True)


@pytest.mark.parametrize("needs", ["pool_gradient", None])
def test_needs_that_are_no_names_are_refused(needs: Any) -> None:
    """With what they are and what to give."""
    scorer = OddScorer("none")
    scorer.needs = needs
    with pytest.raises(UserError, match=f"OddScorer has needs {needs!r}; give a tuple of names"):
        SelectionModule("nowhere", **SGD, scorer=scorer)
