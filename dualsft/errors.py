"""The one exception that a user is meant to read, and the one that can be met with a smaller batch."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class UserError(Exception):
    """A mistake in the input, told in one sentence: what is wrong, where, and what to do.

    The command line prints its message without a traceback and exits with code 1.

    Args:
        problem: The sentence.
        remedy: What to do, where this depends on how the library is used: a caller that is configured by keys says
            which keys in its place (`dualsft.selection.remedies`).
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(f"{problem.removesuffix('.')}; {remedy}." if remedy else problem)
        self.problem, self.remedy = problem, remedy


# torch's allocators and C++'s, the system's own words, and those of CUDA's libraries for linear algebra
_OUT_OF_MEMORY = ("out of memory", "allocate memory", "not enough memory", "bad_alloc", "alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that there is no memory left, on the accelerator or on the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _OUT_OF_MEMORY)


def is_lost_contact(error: BaseException) -> bool:
    """Whether an exception says that another process of the job does not answer any more."""
    if isinstance(error, torch.distributed.DistError):
        return True
    signs = ("gloo", "nccl", "connection reset by peer", "connection closed by peer")
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)


def shortage(error: BaseException) -> str:
    """How memory ran out, in a few words."""
    asked = re.search(r"tried to allocate ([\d.]+) ?(\w+)", str(error), re.IGNORECASE)
    if asked is None:
        return str(error).strip().split("\n")[0] or type(error).__name__
    amount, unit = asked.groups()
    if unit == "bytes":
        amount, unit = f"{int(amount) / 2**20:,.0f}", "MiB"
    return f"at a request for {amount} {unit}"


@contextmanager
def blaming(part: object, method: str) -> Iterator[None]:
    """Tell whatever a part of somebody else's raises as its own, a shortage of memory apart; ours keeps its traceback.

    Args:
        part: A scorer, an allocator or a term of the objective.
        method: Which of its methods is called.

    Raises:
        UserError: if it raises.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        ours = type(part).__module__.startswith("dualsft.")
        if ours or isinstance(error, UserError) or is_out_of_memory(error):
            raise
        reason = (str(error).strip() or "no message").split("\n")[0]
        raise UserError(
            f"{type(part).__name__}.{method} failed ({type(error).__name__}: {reason}); mend {type(part).__module__}."
        ) from error


@contextmanager
def advising(where: str, advice: str) -> Iterator[None]:
    """Answer a shortage of memory with advice, where there is nothing else to try.

    Raises:
        UserError: if memory runs out.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"Memory ran out {where} ({shortage(error)}); {advice}.") from error
