from pathlib import Path

import pytest

from tests.world.jobs import Workspace, make_workspace


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A float32 base model, pool, validation set and selection; nothing may be written there."""
    return make_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a run may write."""
    return tmp_path / "run"
