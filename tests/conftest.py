"""What all tests share: one thread to a process, and checks of annotations where shapes are named."""

import gc
import importlib
import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.annotations import check_annotations
from tests.world.disk import never_wait_for_disk
from tests.world.installed import look_up_once

# Imported first by a module of ours they would be compiled anew in every test process: jaxtyping, which instruments
# that module, looks for the bytecode of all that is imported meanwhile under a name of its own.
LIBRARIES = ("datasets", "lightning", "transformers.models.auto.modeling_auto")
LONGEST = ("test_repository.py", "test_guides.py", "test_compare_page.py")

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
never_wait_for_disk()
look_up_once()


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Prepare a process that runs tests; the one that deals them out to others, and collects none, imports nothing."""
    if session.config.pluginmanager.has_plugin("dsession"):
        return
    for name in LIBRARIES:
        importlib.import_module(name)
    _take_one_thread()
    check_annotations("dualsft")


@pytest.hookimpl(tryfirst=True)  # before markers select
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Heavy tests are slow too; those that follow whole pages, the longest, come first, so that no process waits."""
    for item in items:
        if item.get_closest_marker("heavy"):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish() -> None:
    """Have the garbage collector look no more at what is there before the first test: libraries, which stay."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each process gets a half of the tests in their order, so that a module's fixtures are made once; then it steals.

    The default deals them out a few at a time, which makes nearly every fixture twice.
    """
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getoption("dist") == "load" else None


@pytest.fixture(scope="session", autouse=True)
def _bfloat16_units() -> Iterator[None]:
    """Tests of bfloat16 models compute in bfloat16, whatever the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dualsft.models.dtypes.has_bfloat16_units", lambda: True)
        yield


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """What a test calls may set its own number (pre-training does), which must not slow down the tests after it."""
    yield
    _take_one_thread()


def _take_one_thread() -> None:
    """Small models gain nothing from more threads, and the test processes share the cores."""
    import torch

    torch.set_num_threads(1)
