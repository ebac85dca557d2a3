import pytest

from tests.world.jobs import Inputs, write_inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A tied Llama in float32, a pool with an empty and a truncated row, and a validation set."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))
