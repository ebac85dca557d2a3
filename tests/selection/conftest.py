from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # the process that deals out tests reads this file too, and needs no libraries
    from tests.world.jobs import Inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> "Inputs":
    """A tied Llama in float32, a pool with an empty and a truncated row, and a validation set."""
    from tests.world.jobs import write_inputs

    return write_inputs(tmp_path_factory.mktemp("inputs"))
