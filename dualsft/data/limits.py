"""Limits on the time and the memory that a piece of somebody else's program may take, as a chat template is one.

The time is that of the processor, not of the clock, so that a busy machine does not stop a program that would end. Both
limits need a system with POSIX signals and limits, and the time that of the main thread; elsewhere there are none.
"""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from dualsft.errors import UserError

SECONDS = 10
BYTES = 2**30

_SIZES = "/proc/self/statm"


class _OutOfTime(BaseException):
    """Raised by the timer; no `Exception`, as template engines try what may fail and go on."""


@contextmanager
def limited(program: str, seconds: float = SECONDS, size: int = BYTES) -> Iterator[None]:
    """Limit what runs within; ``program`` is its name and place, with which the error's sentence begins.

    Raises:
        UserError: If it takes longer, or more memory.
    """
    try:
        lift_limit = _limit_memory(size)
        try:
            stop_timer = _start_timer(seconds)
            try:
                yield
            finally:
                stop_timer()
        finally:
            lift_limit()
    except _OutOfTime as error:
        raise UserError(f"{program} has not come to an end after {seconds:g} s; mend or replace it.") from error
    except MemoryError as error:
        raise UserError(f"{program} takes more than {size / 2**30:g} GiB of memory; mend or replace it.") from error


def _start_timer(seconds: float) -> Callable[[], None]:
    """Have `_OutOfTime` raised after a time of the processor; returns what ends this."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        return _nothing

    def stop(number: int, frame: FrameType | None) -> None:
        raise _OutOfTime

    handler = signal.signal(signal.SIGVTALRM, stop)
    timer = signal.setitimer(signal.ITIMER_VIRTUAL, seconds)

    def restore() -> None:
        signal.setitimer(signal.ITIMER_VIRTUAL, *timer)
        signal.signal(signal.SIGVTALRM, signal.SIG_DFL if handler is None else handler)

    return restore


def _limit_memory(size: int) -> Callable[[], None]:
    """Limit the growth of the address space; allocations beyond it fail with a MemoryError. Returns what ends this."""
    if sys.platform != "linux":
        return _nothing
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open(_SIZES, "rb", buffering=0) as sizes:
        pages = int(sizes.read(64).split(None, 1)[0])
    limit = pages * resource.getpagesize() + size
    others = [one for one in (soft, hard) if one != resource.RLIM_INFINITY]
    with suppress(ValueError, OSError):  # where it may not be set there is none
        resource.setrlimit(resource.RLIMIT_AS, (min([limit, *others]), hard))
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _nothing() -> None:
    pass
