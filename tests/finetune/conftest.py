from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # the process that deals out tests reads this file too, and needs no libraries
    from tests.world.jobs import Workspace


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> "Workspace":
    """A float32 base model, pool, validation set and selection; nothing may be written there."""
    from tests.world.jobs import make_workspace

    return make_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a run may write."""
    return tmp_path / "run"
