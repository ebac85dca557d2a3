from pathlib import Path

import pytest

from dualsft.selection import Selection
from tests.reports.cases import write_selection_case
from tests.world.jobs import Inputs


@pytest.fixture(scope="session")
def selection_case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Inputs, Selection]:
    """A tiny selection with scores by token, and what it was made from."""
    return write_selection_case(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="session")
def selection(selection_case: tuple[Inputs, Selection]) -> Selection:
    """The selection alone."""
    return selection_case[1]


@pytest.fixture(scope="session")
def tiny_model(selection_case: tuple[Inputs, Selection]) -> Path:
    """The folder of its model."""
    return Path(selection_case[0].model)
