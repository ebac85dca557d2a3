"""The exception for users' mistakes, and tests for exceptions of lack of memory or lost contact."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb

import torch

_HEAD, _TAIL = 500, 350  # characters: where something is wrong, and what to do


def clipped(message: str) -> str:
    """Cut a message of more than 850 characters in the middle, which is where it quotes what was given."""
    return message if len(message) <= _HEAD + _TAIL else f"{message[:_HEAD]} ... {message[-_TAIL:]}"


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its class where there is none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class UserError(Exception):
    """A mistake in the input; the message says in one sentence what is wrong, where, and what to do.

    The command line prints its message without a traceback and exits with code 1. A long message is `clipped`.

    Args:
        problem: The sentence.
        remedy: What to do, where this depends on how the library is used: a caller that is configured by keys says
            which keys in its place (`dualsft.selection.remedies`).
        by_another_rank: Whether another rank of the job found the mistake, and tells it.
    """

    def __init__(self, problem: str, remedy: str = "", by_another_rank: bool = False) -> None:
        super().__init__(clipped(f"{problem.removesuffix('.')}; {remedy}." if remedy else problem))
        self.problem, self.remedy, self.by_another_rank = problem, remedy, by_another_rank


# the messages of torch's allocators, of C++, of the system, and of CUDA's linear algebra libraries
_OUT_OF_MEMORY = ("out of memory", "allocate memory", "not enough memory", "bad_alloc", "alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception reports that memory ran out, on the accelerator or on the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _OUT_OF_MEMORY)


def is_lost_contact(error: BaseException) -> bool:
    """Whether an exception reports that another process of the job no longer answers."""
    if isinstance(error, torch.distributed.DistError):
        return True
    signs = ("gloo", "nccl", "connection reset by peer", "connection closed by peer")
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)


def shortage(error: BaseException) -> str:
    """A few words on an out-of-memory exception: how much was requested, or its first line."""
    asked = re.search(r"tried to allocate ([\d.]+) ?(\w+)", str(error), re.IGNORECASE)
    if asked is None:
        return first_line(error)
    amount, unit = asked.groups()
    if unit == "bytes":
        amount, unit = f"{int(amount) / 2**20:,.0f}", "MiB"
    return f"at a request for {amount} {unit}"


@contextmanager
def blaming(part: object, method: str) -> Iterator[None]:
    """Turn an exception of a method of a plugin into a `UserError` that names the plugin.

    A plugin is a scorer, a path, an allocator or a term of the objective. Exceptions for lack of memory pass, as do
    those of the package's own classes, which keep their traceback.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        if is_own(part) or isinstance(error, UserError) or is_out_of_memory(error):
            raise
        reason = (str(error).strip() or "no message").split("\n")[0]
        module = type(part).__module__
        raise UserError(
            f"{type(part).__name__}.{method} failed ({type(error).__name__}: {reason}{raised_at(error, module)})",
            f"mend {module}",
        ) from error


def is_own(part: object) -> bool:
    """Whether an object's class is one of this package, and not a plugin's."""
    return type(part).__module__.startswith("dualsft.")


def raised_at(error: BaseException, module: str) -> str:
    """The innermost file and line of an exception in the package of a module, as ", at FILE, line N"; empty if none."""
    package = module.partition(".")[0]
    own = [
        f", at {frame.f_code.co_filename}, line {line}"
        for frame, line in walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__", "")).partition(".")[0] == package
    ]
    return own[-1] if own else ""


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Start a user error with the option that it is about, where the code that raises it does not know the option."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


@contextmanager
def advising(where: str, advice: str) -> Iterator[None]:
    """Turn an out-of-memory exception into a `UserError` with advice; ``where`` is such as "in the warm-up"."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"Memory ran out {where} ({shortage(error)}); {advice}.") from error
