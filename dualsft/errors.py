"""The one exception that a user is meant to read, and the one that can be met with a smaller batch."""

import torch


class UserError(Exception):
    """A mistake in the input, told in one sentence: what is wrong, where, and what to do.

    The command line prints its message without a traceback and exits with code 1.
    """


_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "bad_alloc", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that there is no memory left, on the accelerator or on the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OUT_OF_MEMORY)
