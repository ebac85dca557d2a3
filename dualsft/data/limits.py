"""Limits on the time and the memory that a piece of somebody else's program may take, as a chat template is one.

The time is that of the processor, not of the clock, so that a busy machine does not stop a program that would end. Both
limits need a system with POSIX signals and limits, and the time that of the main thread; elsewhere there are none.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType

from dualsft.errors import UserError

SECONDS = 10
BYTES = 2**30

_SIZES = Path("/proc/self/statm")


class _OutOfTime(BaseException):
    """Raised by the timer; no `Exception`, as template engines try what may fail and go on."""


@contextmanager
def limited(program: str, seconds: float = SECONDS, size: int = BYTES) -> Iterator[None]:
    """Limit what runs within; ``program`` is its name and place, with which the error's sentence begins.

    Raises:
        UserError: If it takes longer, or more memory.
    """
    try:
        with ExitStack() as limits:
            limits.enter_context(_limited_memory(size))
            if hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread():
                limits.enter_context(_limited_time(seconds))
            yield
    except _OutOfTime as error:
        raise UserError(f"{program} has not come to an end after {seconds:g} s; mend or replace it.") from error
    except MemoryError as error:
        raise UserError(f"{program} takes more than {size / 2**30:g} GiB of memory; mend or replace it.") from error


@contextmanager
def _limited_time(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise _OutOfTime

    handler = signal.signal(signal.SIGVTALRM, stop)
    timer = signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, *timer)
        signal.signal(signal.SIGVTALRM, signal.SIG_DFL if handler is None else handler)


@contextmanager
def _limited_memory(size: int) -> Iterator[None]:
    """Limit the growth of the address space; allocations beyond it fail with a MemoryError."""
    if sys.platform != "linux":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(_SIZES.read_bytes().split(None, 1)[0])
    limit = pages * resource.getpagesize() + size
    others = [one for one in (soft, hard) if one != resource.RLIM_INFINITY]
    with suppress(ValueError, OSError):  # where it may not be set there is none
        resource.setrlimit(resource.RLIMIT_AS, (min([limit, *others]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
