"""What is installed."""

import importlib.metadata
from functools import cache
from unittest import mock


def look_up_once() -> None:
    """Has versions and entry points of packages read from the disk once: they stay, and each trainer asks for them.

    It is for modules that are imported later.
    """
    for name in ("version", "entry_points"):
        mock.patch.object(importlib.metadata, name, cache(getattr(importlib.metadata, name))).start()
