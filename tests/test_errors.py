import errno

import pytest
import torch

from dualsft.allocators import TopK
from dualsft.errors import UserError, advising, blaming, is_out_of_memory, shortage
from tests.world.faults import SHORTAGES

TOLD = {"accelerator": "at a request for 2.00 GiB", "host": "at a request for 2,048 MiB", "python": "MemoryError"}


@pytest.mark.parametrize("kind", SHORTAGES)
def test_a_shortage_is_told_in_a_few_words(kind: str) -> None:
    """How much was asked for where it is known, in units that can be read, and never a page."""
    assert is_out_of_memory(SHORTAGES[kind])
    assert shortage(SHORTAGES[kind]) == TOLD[kind]
    with pytest.raises(UserError) as told, advising("in the warm-up", "buy more"):
        raise SHORTAGES[kind]
    assert str(told.value) == f"Memory ran out in the warm-up ({TOLD[kind]}); buy more."


def test_a_long_message_keeps_both_ends() -> None:
    """Where something is wrong and what to do stay; of a long value in between the middle goes."""
    told = str(UserError(f"pool.jsonl, row 3: {'x' * 5000} is no role", "rename it"))
    assert len(told) < 900
    assert told.startswith("pool.jsonl, row 3: xxx")
    assert told.endswith("xxx is no role; rename it.")
    assert " ... " in told


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: not enough memory"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_a_shortage_is_known_by_many_names(error: Exception) -> None:
    """Those of torch's allocators, of CUDA's libraries, of C++ and of the system."""
    assert is_out_of_memory(error)
    assert "\n" not in shortage(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), OSError(errno.ENOENT, "x"), UserError("Memory ran out"), ValueError()]
)
def test_other_errors_are_no_shortage(error: Exception) -> None:
    """They pass through the advice as they are."""
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)) as found, advising("in the warm-up", "buy more"):
        raise error
    assert found.value is error


def test_the_systems_own_shortage_is_known() -> None:
    """What torch raises when it asks for more than there can be."""
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(found.value)
    assert shortage(found.value) == "at a request for 1,099,511,627,776 MiB"


class Part:
    """Of somebody else's."""


def test_a_strangers_error_is_told_as_his() -> None:
    """In one sentence with class, method and reason; a shortage and what is said for users pass, and so does ours."""

    def fail(part: object, error: Exception) -> None:
        with blaming(part, "draw"):
            raise error

    with pytest.raises(
        UserError,
        match=r"^Part\.draw failed \(ValueError: too odd, at .*test_errors\.py, line \d+\); mend tests\.test_errors\.$",
    ):
        fail(Part(), ValueError("too odd\nfor words"))
    with pytest.raises(UserError, match=r"\(ZeroDivisionError: no message, at "):
        fail(Part(), ZeroDivisionError())
    with pytest.raises(MemoryError):
        fail(Part(), MemoryError())
    with pytest.raises(UserError, match=r"^as it is$"):
        fail(Part(), UserError("as it is"))
    with pytest.raises(ValueError, match="a bug"):
        fail(TopK(), ValueError("a bug"))
