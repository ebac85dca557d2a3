"""One thread per test process: small models gain nothing from more, and the processes share the cores."""

import os
from collections.abc import Iterator

import pytest
import torch

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """What a test calls may set its own number (pre-training does), which must not slow down the tests after it."""
    yield
    torch.set_num_threads(1)
