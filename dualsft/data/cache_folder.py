"""The folder of what is too large for memory, or too costly to make twice."""

from pathlib import Path

from dualsft.errors import first_line
from dualsft.storage.paths import expanded, named

LARGE = 2**25
"""Bytes of records from which on a pool goes there unasked: half a minute of encoding."""


def cache_folder(given: str | None) -> Path:
    """The folder: the one that is given, else ``dualsft`` in the home of Hugging Face's caches."""
    if given is not None:
        return Path(expanded(given))
    from huggingface_hub import constants  # slow to import

    return Path(constants.HF_HOME) / "dualsft"


def refused(folder: Path, error: BaseException, so_that: str) -> str:
    """A sentence on a folder that cannot be used, and what follows."""
    reason = getattr(error, "strerror", None) or first_line(error)
    return f"{named(folder)} cannot be used as a cache ({reason}), so that {so_that}; give another data.cache_dir."
