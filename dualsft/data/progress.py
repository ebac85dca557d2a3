"""How far the encoding of a pool is; whoever runs a command says how that is shown."""

from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from typing import Any

from dualsft.data.supervision import Chunks

Progress = Callable[[str, float], AbstractContextManager[Any]]
"""Opens a bar of this title and total, such as `dualsft.runs.bars.bar`; its ``advance`` counts what has been done."""


def watched(chunks: Chunks, rows: int, progress: Progress) -> Chunks:
    """The chunks of this many rows, each counted as it comes."""
    with closing(chunks), progress("encoding records", rows) as bar:
        for chunk in chunks:
            bar.advance(len(chunk.lengths))
            yield chunk
