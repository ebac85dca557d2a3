from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # the process that deals out tests reads this file too, and needs no libraries
    from dualsft.plans.shape import ModelShape


@pytest.fixture(scope="session")
def shape_in(tmp_path_factory: pytest.TempPathFactory) -> "Callable[[Any], ModelShape]":
    """The shape of `tiny_llama` in a type: the same for all tests, so that what one has traced the others find."""

    @cache
    def made(dtype: Any) -> "ModelShape":
        from tests.plans.cases import tiny_shape

        return tiny_shape(tmp_path_factory.mktemp("shape"), dtype)

    return made


@pytest.fixture(scope="session")
def shape(shape_in: "Callable[[Any], ModelShape]") -> "ModelShape":
    """The shape of `tiny_llama` in float32."""
    return shape_in("float32")
