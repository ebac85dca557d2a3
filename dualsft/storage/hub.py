"""Whether the Hugging Face hub can be reached, asked once: its clients find out by trying again for half a minute."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

OFFLINE = "this machine is offline: the hub cannot be reached, and its cache has no copy"
_SECONDS = 5.0


def is_reachable() -> bool:
    """Whether the hub answers within some seconds; not asked where ``HF_HUB_OFFLINE`` forbids it."""
    from huggingface_hub import constants, get_session  # slow to import

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception:  # of whichever client it is built on
        return False
    return True


@contextmanager
def cache_alone_when_offline() -> Iterator[bool]:
    """Ask the hub's clients for their cache alone, where the hub cannot be reached; yields whether that is so.

    Libraries that are imported later are not told.
    """
    if is_reachable():
        yield False
        return
    from huggingface_hub import constants

    loaded = sys.modules.get("datasets")
    configurations: list[Any] = [constants, *([loaded.config] if loaded else [])]
    before = [of.HF_HUB_OFFLINE for of in configurations]
    for of in configurations:
        of.HF_HUB_OFFLINE = True
    try:
        yield True
    finally:
        for of, offline in zip(configurations, before, strict=True):
            of.HF_HUB_OFFLINE = offline
