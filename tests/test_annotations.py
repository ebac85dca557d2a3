"""Annotations are checked wherever shapes are named, and however often a function is defined."""

from collections.abc import Callable
from inspect import unwrap
from typing import Any

import pytest
import torch
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from dualsft.matrix.nonfinite import all_finite
from dualsft.matrix.rows import Rows
from dualsft.objectives.likelihood import token_losses
from tests import annotations
from tests.annotations import checked, jaxtyped, jaxtyped_with_shapes, modules_with_shapes


def adder(hint: Any, value: float) -> Callable[..., Any]:
    """Defines a function that adds a number to what its annotations let through."""

    @jaxtyped(typechecker=checked)
    def add(x: hint, y: hint) -> hint:
        return x + y + value

    return add


def test_every_definition_is_checked() -> None:
    """The second of one function refuses what the first does, axis names included, and has its own value."""
    for value in (1.0, 2.0):
        add = adder(Float[Tensor, "n"], value)
        assert torch.equal(add(torch.zeros(3), torch.zeros(3)), torch.full((3,), value))
        with pytest.raises(TypeCheckError, match="checking the parameters"):
            add(torch.zeros(3), torch.zeros(4))
        with pytest.raises(TypeCheckError, match="checking the parameters"):
            add(0, 0)


def test_results_are_checked() -> None:
    """Of later definitions too."""
    for _ in range(2):
        with pytest.raises(TypeCheckError, match="checking the return value"):
            adder(int, 0.5)(1, 2)


def test_other_annotations_have_other_checks() -> None:
    """Though they are in the same place."""
    assert adder(float, 1.0)(1.0, 2.0) == 4.0
    with pytest.raises(TypeCheckError):
        adder(Tensor, 1.0)(1.0, 2.0)
    with pytest.raises(TypeCheckError):
        adder(float, 1.0)(torch.zeros(1), torch.zeros(1))


def test_checks_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two for a function, of its arguments and of its result, however often it is defined."""
    compiled = []

    def compile_checks(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled.append(function)
        return function

    monkeypatch.setattr(annotations, "beartype", compile_checks)
    monkeypatch.setattr(annotations, "_CHECKS", {})
    for _ in range(3):
        adder(float, 1.0)
    assert len(compiled) == 2


def test_modules_that_name_shapes_are_checked() -> None:
    """They are found in the source, and those without shapes are left alone."""
    found = modules_with_shapes("dualsft")
    assert {"dualsft.scorers.base", "dualsft.data.packing"} <= set(found)
    assert "dualsft.errors" not in found
    with pytest.raises(TypeCheckError):
        token_losses(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.long))


def test_functions_that_name_shapes_are_checked() -> None:
    """However deep in an annotation the shape is; others, which mypy checks, are left as they are."""
    decorate = jaxtyped_with_shapes(typechecker=checked)
    shape = Float[Tensor, " n"]
    shaped: list[Any] = [shape, list[shape] | None, dict[str, tuple[shape, int]]]
    for function in (unwrap(adder(hint, 0.0)) for hint in shaped):
        assert decorate(function) is not function
    plain: list[Any] = [int, Tensor, Callable[[int], Tensor], tuple[int, ...]]
    for function in (unwrap(adder(hint, 0.0)) for hint in plain):
        assert decorate(function) is function
    assert hasattr(all_finite, "__wrapped__")
    assert not hasattr(Rows.check_shape, "__wrapped__")
