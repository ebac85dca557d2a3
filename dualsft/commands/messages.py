"""Error messages for users, and silence about anything that they cannot mend.

Errors of the parser and of the libraries below become one plain sentence each.
"""

import logging
import os
import re
import sys
import traceback
import warnings
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager

from dualsft.commands.sentences import causes, plainly
from dualsft.commands.terminal import one_line
from dualsft.errors import UserError, clipped, is_lost_contact, is_out_of_memory, shortage
from dualsft.sharding.collectives import is_rank_zero
from dualsft.sharding.groups import rank
from dualsft.sharding.last_words import has_anyone_spoken, is_first_to_say

LOST_CONTACT = (
    "another process of this job has stopped or cannot be reached, and says itself why if it could; the same command "
    "with --resume goes on from what has been kept."
)
INTERRUPTED = "interrupted; the same command with --resume goes on from what is finished."


def explanation(error: BaseException) -> tuple[str, int] | None:
    """The sentence and the exit code for an exception that ends the program; None for one that a user cannot mend."""
    if isinstance(error, UserError) or _is_misconfiguration(error):
        message, code = str(error), 1
    elif isinstance(error, ArgumentError):
        message, code = plainly(error), 2
    elif isinstance(error, OSError) and error.filename:
        message, code = f"{error.filename} cannot be used: {error.strerror}.", 1
    elif isinstance(error, KeyboardInterrupt):
        message, code = INTERRUPTED, 130
    elif is_lost_contact(error):
        message, code = LOST_CONTACT, 1
    elif isinstance(error, (RuntimeError, MemoryError)) and is_out_of_memory(error):
        advice = "lower data.batch_tokens, or set model.dtype to bfloat16"
        message, code = f"memory ran out ({shortage(error)}); {advice}.", 1
    else:
        return None
    place = "" if is_rank_zero() else f" (rank {_rank()})"
    return f"dualsft: error{place}: {clipped(' '.join(message.split()))}", code


def _rank() -> str:
    """This process's rank; the launcher's number for it, if it fails before the ranks have found each other."""
    given = (os.environ.get(name) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))
    return str(rank()) if rank() else next(filter(None, given), "0")


def is_told_by_another_rank(error: BaseException) -> bool:
    """Whether another rank of the job tells, or has told, why it ends; otherwise this one counts as having told it."""
    chain = list(causes(error))
    if any(isinstance(cause, UserError) and cause.by_another_rank for cause in chain):
        return True
    if any(map(is_lost_contact, chain)) and has_anyone_spoken():
        return True
    return not is_first_to_say(f"{type(error).__name__}: {error}")


def _is_misconfiguration(error: BaseException) -> bool:
    """Whether Lightning refuses the settings; it is not imported to find out, as only it raises such errors."""
    exceptions = sys.modules.get("lightning.fabric.utilities.exceptions")
    return exceptions is not None and isinstance(error, exceptions.MisconfigurationException)


def quieten() -> None:
    """Silence other libraries' tips and deprecation warnings, about which a user can do nothing."""
    from transformers.utils import logging as transformers_logging  # messages of other verbs need no transformers

    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's calls, not ours
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.formatwarning = one_line  # Lightning has put its own there
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    # the override copies only the masters, which is intended
    warnings.filterwarnings("ignore", message="You're using the WeightAveraging callback with a model that overrides")


@contextmanager
def explaining_settings() -> Iterator[None]:
    """Turn an error of making a class from its settings into one sentence, in the class's words, not the parser's."""
    try:
        yield
    except (UserError, ArgumentError):
        raise
    except Exception as error:
        raise UserError(_unusable(error)) from error


def _unusable(error: Exception) -> str:
    for cause in causes(error):
        if isinstance(cause, UserError):
            return str(cause)
    problem = r"Errors:\n\s+- (?:Problem with given class_path .*:\s+)?(.*)"
    refusal, given = re.search(problem, str(error)), re.search(r"class_path='([\w.]+)'", str(error))
    if refusal and given:
        return f"{given[1]} cannot be made with these options: {refusal[1]}"
    return f"These settings cannot be used: {error}"


def refused(error: Exception) -> str | None:
    """The message of an error that Lightning or the file system raises during a run; None for any other error.

    Lightning finds many mistakes in a trainer's settings only as it sets up its loops, and raises errors of all kinds.
    """
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename} cannot be used: {error.strerror}."
    if isinstance(error, UserError) or _is_misconfiguration(error):
        return None
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    ours = frame.f_globals.get("__name__", "").startswith("lightning.")
    return str(error) if ours and isinstance(error, (ValueError, RuntimeError, TypeError, AttributeError)) else None
