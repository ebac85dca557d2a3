from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # the process that deals out tests reads this file too, and needs no libraries
    from dualsft.selection import Selection
    from tests.world.jobs import Inputs


@pytest.fixture(scope="session")
def selection_case(tmp_path_factory: pytest.TempPathFactory) -> "tuple[Inputs, Selection]":
    """A tiny selection with scores by token, and what it was made from."""
    from tests.reports.cases import write_selection_case

    return write_selection_case(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="session")
def selection(selection_case: "tuple[Inputs, Selection]") -> "Selection":
    """The selection alone."""
    return selection_case[1]


@pytest.fixture(scope="session")
def tiny_model(selection_case: "tuple[Inputs, Selection]") -> Path:
    """The folder of its model."""
    return Path(selection_case[0].model)
