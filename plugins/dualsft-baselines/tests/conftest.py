import pytest
import torch
from baseline_cases import Job, write_job

torch.set_num_threads(1)  # test processes share the cores


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A tiny model, a pool and a validation set."""
    return write_job(tmp_path_factory.mktemp("job"))
