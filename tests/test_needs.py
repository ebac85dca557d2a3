"""What plugins are given: a use of what was not asked for is told with the name to add."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from dualsft.allocators import ScoredExamples, ScoredParameters
from dualsft.errors import UserError
from dualsft.needs import Given, ask
from dualsft.paths import Piece, PieceRows
from dualsft.scorers import ParameterStatistics

ONE = torch.ones(2)


@dataclass
class Plugin:
    """Anybody's, which does something with what it is given."""

    use: Callable[[Any], object]
    needs: tuple[str, ...] = ()
    needs_of_examples: tuple[str, ...] = ()

    def do(self, given: Any) -> object:
        """By its option."""
        return self.use(given)


GIVEN: dict[str, Callable[[], Given]] = {
    "statistics": lambda: ParameterStatistics("w", ONE, ONE, ONE, 0.1, 2),
    "examples": lambda: ScoredExamples(torch.arange(2), ONE, torch.ones(2, dtype=torch.int64), [{}, {}]),
    "weights": lambda: ScoredParameters({"w": ONE}),
    "piece": lambda: Piece("w", 0, ONE, ONE, 0.1),
    "rows": lambda: PieceRows(torch.arange(2), ONE, torch.ones(2, dtype=torch.int64)),
}


def asserting(given: Any) -> None:
    """As mypy would have it; pytest's own assertions read all fields to show them."""
    if given.pool_gradient is None:
        raise AssertionError


@pytest.mark.parametrize(
    ("given", "use", "told"),
    [
        ("statistics", lambda s: ONE * s.pool_gradient, r"pool_gradient .*; add 'pool_gradient' to Plugin\.needs\.$"),
        ("statistics", lambda s: s.second_moment.sqrt(), r"second_moment .*; add 'second_moment' to Plugin\.needs\.$"),
        ("statistics", lambda s: s.hessian_vector, r"^Plugin\.do gave back None: .*; add 'hessian_vector' to Plugin\."),
        ("statistics", asserting, r"\(AssertionError: .*; add 'pool_gradient' to Plugin\.needs\.$"),
        (
            "statistics",
            lambda s: torch.stack([s.second_moment, s.pool_gradient]),
            r"add 'second_moment' to Plugin\.needs and 'pool_gradient' to Plugin\.needs\.$",
        ),
        ("examples", lambda e: e.loss > 1, r"it uses loss without asking for it; add 'loss' to Plugin\.needs\.$"),
        ("weights", lambda s: s.weight["w"], r"it uses weight without .*; add 'weight' to Plugin\.needs\.$"),
        ("piece", lambda p: -p.scorer_direction, r"add 'scorer_direction' to Plugin\.needs\.$"),
        (
            "rows",
            lambda r: r.score * r.validation_norm,
            r"uses validation_norm .*; add 'statistics' to Plugin\.needs\.$",
        ),
        ("rows", lambda r: r.gradient_norm + 1, r"add 'gradient_norm' to Plugin\.needs_of_examples\.$"),
    ],
)
def test_an_undeclared_need_is_told_with_the_name_to_add(given: str, use: Any, told: str) -> None:
    """However the missing value was used, and wherever it is to be asked for."""
    with pytest.raises(UserError, match=told):
        ask(Plugin(use), "do", GIVEN[given]())


def optional(given: Any) -> object:
    """Does without what it has not asked for, and fails for another reason."""
    names: dict[str, int] = {}
    return None if given.pool_gradient is not None else names["missing"]


def test_other_failures_are_not_put_down_to_needs() -> None:
    """Not one after a look at what may be missing, nor one that has all it asked for; and an answer stays one."""
    statistics = GIVEN["statistics"]()
    with pytest.raises(UserError, match=r"KeyError: 'missing', at .*; mend tests\.test_needs\.$"):
        ask(Plugin(optional), "do", statistics)
    with pytest.raises(UserError, match=r"; mend tests\.test_needs\.$"):
        ask(Plugin(lambda s: -s.pool_gradient, needs=("pool_gradient",)), "do", statistics)
    assert ask(Plugin(lambda s: s.step_size if s.pool_gradient is None else 0), "do", statistics) == 0.1
