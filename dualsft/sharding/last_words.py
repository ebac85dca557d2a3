"""How a job of several ranks ends after a failure: each message is told once, and no rank is left over.

The ranks share the store by which they found each other. Whoever tells a message leaves it there, and ranks that fail
for the same reason, or only because another has stopped, remain silent. A rank that has failed leaves the job at once,
so that the others, which wait for it in a collective, stop too; rank zero, with which the store may end, ends last.
"""

import hashlib
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from typing import Any

from torch import distributed

from dualsft.sharding.groups import is_distributed, rank, world_size

_SAID, _ENDED = "dualsft/said", "dualsft/ended"
_LAST_SECONDS, _GRACE_SECONDS, _POLL_SECONDS = 3.0, 10.0, 0.5


def is_first_to_say(words: str) -> bool:
    """Whether no rank has said this before; counts it as said."""
    digest = hashlib.sha256(words.encode(errors="replace")).hexdigest()
    is_first = _count(f"{_SAID}/{digest}", 1) <= 1
    if is_first:
        _count(_SAID, 1)
    return is_first


def has_anyone_spoken() -> bool:
    """Whether any rank has told why it failed."""
    return _count(_SAID, 0) > 0


def leave_job() -> None:
    """Let the other ranks know that this one has stopped; on rank zero, wait a moment until they have stopped too."""
    if not is_distributed():
        return
    try:
        store, is_first, size = _store(), rank() == 0, world_size()
        distributed.distributed_c10d._abort_process_group()
        if store is None:
            return
        ended, end = store.add(_ENDED, 1), time.monotonic() + _LAST_SECONDS
        while is_first and ended < size and time.monotonic() < end:
            time.sleep(0.05)
            ended = store.add(_ENDED, 0)
    except Exception:  # nothing is left to be told
        pass


def _count(key: str, by: int) -> int:
    """Add to a number that the ranks share, and return it; 0 where they share nothing any more."""
    try:
        store = _store()
        return int(store.add(key, by)) if store else 0
    except RuntimeError:  # the process that has the store has ended
        return 0


def _store() -> Any:
    """The store of the job; None for a single process, and where the process that had the store has ended."""
    early = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's, before the ranks find each other
    if not is_distributed() and not early:
        return None
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:  # torch would print pages about a lost store
        socket.create_connection(place, timeout=_LAST_SECONDS).close()
    except OSError:
        return None
    if is_distributed():
        return distributed.distributed_c10d._get_default_store()
    store = distributed.TCPStore(*place, is_master=False, timeout=timedelta(seconds=_LAST_SECONDS))
    return distributed.PrefixStore(f"dualsft/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '')}", store)


def end_with_parent() -> None:
    """Have this process end when the one that started it does, even if it is in no collective that would fail then."""
    threading.Thread(target=_outlive_briefly, args=(os.getppid(),), daemon=True).start()


def _outlive_briefly(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    time.sleep(_GRACE_SECONDS)  # in which this process says itself what it has to say
    print(
        f"dualsft: error (rank {rank()}): the process that started this one has ended; the same command with "
        "--resume goes on from what has been kept.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
