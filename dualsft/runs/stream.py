"""Where progress is shown: whether anyone watches, and whether anyone wants it."""

import os
from typing import Any

QUIET = "DUALSFT_QUIET"
"""The environment variable by which a job and its processes show no progress."""


def is_terminal(stream: Any) -> bool:
    """Whether a stream is a terminal that somebody watches: no file or pipe, no dumb terminal, and not under CI."""
    watched = os.environ.get("TERM") != "dumb" and os.environ.get("CI", "").lower() in ("", "0", "false")
    return watched and stream is not None and bool(stream.isatty())


def is_quiet() -> bool:
    """Whether progress is unwanted."""
    return os.environ.get(QUIET, "") not in ("", "0")
