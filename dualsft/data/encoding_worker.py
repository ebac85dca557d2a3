"""A process that encodes chunks of records, as `dualsft.data.encoding_processes` starts it.

It reads messages from its standard input, and answers each on its standard output, until there are no more.
"""

import os
import pickle
import sys
from contextlib import suppress
from typing import Any, BinaryIO

from dualsft.data.encoding import Encoding
from dualsft.data.records import Records
from dualsft.errors import UserError

Excerpt = dict[int, tuple[str, int]]
"""Some of the lines: row -> text and number."""


class ExcerptOfLines:
    """The lines that a process has been given, in place of all of them.

    Args:
        size: How many there are in all.
        kept: Those that stay.
    """

    def __init__(self, size: int, kept: Excerpt) -> None:
        self._size, self._kept, self.given = size, kept, Excerpt()

    def __len__(self) -> int:
        return self._size

    def text(self, row: int) -> str:
        """The text of a line."""
        return self._line(row)[0]

    def number(self, row: int) -> int:
        """The number of a line."""
        return self._line(row)[1]

    def _line(self, row: int) -> tuple[str, int]:
        return self.given[row] if row in self.given else self._kept[row]


def main() -> None:
    """Answer messages: the first one tells how to encode, each of the others gives a chunk's rows and lines."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    messages: BinaryIO = sys.stdin.buffer
    with suppress(EOFError, BrokenPipeError):  # whoever asks has ended
        parts, size, kept, *how = pickle.load(messages)
        lines: Any = ExcerptOfLines(size, kept)
        encoding = Encoding(Records(parts, "", lines), *how)
        _answer(answers, True)
        while True:
            rows, lines.given = pickle.load(messages)
            try:
                _answer(answers, encoding.encoded(rows))
            except UserError as error:
                _answer(answers, (error.problem, error.remedy))


def _answer(stream: BinaryIO, answer: Any) -> None:
    pickle.dump(answer, stream, protocol=pickle.HIGHEST_PROTOCOL)
    stream.flush()


if __name__ == "__main__":
    main()
