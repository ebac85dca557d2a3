"""Encodes a large pool in several processes: chunks in order, and of several mistakes the first one's sentence.

The processes are programs of their own, which import nothing of the script that asks for them. Each ends when this one
does, as its standard input ends then.
"""

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import Any

from transformers import PreTrainedTokenizerBase

from dualsft.data.encoding import Encoding
from dualsft.data.options import FormatOptions
from dualsft.data.records import Records
from dualsft.data.supervision import Chunk, Chunks
from dualsft.errors import UserError

_COMMAND = [sys.executable, "-m", "dualsft.data.encoding_worker"]
_ALONE = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
_AHEAD = 3  # chunks to a process that are asked for before the first of them is taken


def encoded_in_processes(
    records: Records, tokenizer: PreTrainedTokenizerBase, options: FormatOptions, max_length: int, count: int
) -> Chunks:
    """Renders and tokenises every record in order, a chunk at a time, in other processes, or in this one if none can.

    Args:
        records: The records.
        tokenizer: A fast tokenizer.
        options: How they are read.
        max_length: Tokens to keep of each.
        count: How many processes.

    Raises:
        UserError: If no format fits, a record does not fit the format, or a process is killed.
    """
    encoding = Encoding(records, tokenizer, options, max_length)
    kept = {part.start: _line(records, part.start) for part in records.parts}
    try:
        how = pickle.dumps((records.parts, len(records), kept, tokenizer, options, max_length))
    except Exception:  # a tokenizer of one's own making
        how = b""
    with _workers(how, count if how else 0) as workers, ThreadPoolExecutor(max(1, len(workers))) as threads:
        if not workers:
            yield from map(encoding.encoded, encoding.chunks())
            return
        free: SimpleQueue[_Worker] = SimpleQueue()
        for worker in workers:
            free.put(worker)

        def encode(rows: range) -> Chunk:
            worker = free.get()
            try:
                return worker.encoded(rows, {row: _line(records, row) for row in rows})
            finally:
                free.put(worker)

        pending: deque[Future[Chunk]] = deque()
        try:
            for rows in encoding.chunks():
                pending.append(threads.submit(encode, rows))
                if len(pending) == _AHEAD * len(workers):
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
            _stop(workers)


def available_processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _line(records: Records, row: int) -> tuple[str, int]:
    line = records.source_line(row)
    return line.text, line.number


@contextmanager
def _workers(how: bytes, count: int) -> Iterator[list["_Worker"]]:
    """Start processes, and end them; those that cannot encode are left out, as where a module is missing."""
    workers: list[_Worker] = []
    try:
        with suppress(OSError):  # as many as the system lets there be
            for _ in range(count):
                workers.append(_Worker(how))
        with ThreadPoolExecutor(max(1, count)) as threads:
            try:
                ready = list(threads.map(_Worker.is_ready, workers))
            except BaseException:  # an interruption need not wait for what they import
                _stop(workers)
                raise
        yield [worker for worker, can in zip(workers, ready, strict=True) if can]
    finally:
        _stop(workers)
        for worker in workers:
            worker.close()


def _stop(workers: Sequence["_Worker"]) -> None:
    """End processes at once, and so what waits for them."""
    for worker in workers:
        worker.stop()


class _LostError(Exception):
    """A process has ended, with this exit code."""


class _Worker:
    """One process.

    Args:
        how: The message that tells it how to encode.
    """

    def __init__(self, how: bytes) -> None:
        self._process = subprocess.Popen(
            _COMMAND,
            env={**os.environ, **_ALONE},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # an interrupt from the keyboard is for this process, which ends the others
        )
        self._how = how

    def is_ready(self) -> bool:
        """Tell it how to encode; whether it can."""
        with suppress(_LostError):
            return self._ask(self._how) is True
        return False

    def encoded(self, rows: range, lines: dict[int, tuple[str, int]]) -> Chunk:
        """Have it encode a chunk."""
        try:
            answer = self._ask(pickle.dumps((rows, lines)))
        except _LostError as error:
            raise UserError(
                f"A process that encoded rows {rows[0]:,} to {rows[-1]:,} ended too early (exit code {error}), "
                "perhaps for lack of memory; give fewer data.encoding_processes."
            ) from error
        if isinstance(answer, Chunk):
            return answer
        raise UserError(*answer)

    def stop(self) -> None:
        """End it at once, which whoever waits for its answer is told."""
        self._process.kill()

    def close(self) -> None:
        """Close its pipes, and wait for its end."""
        with suppress(OSError), self._process:
            pass

    def _ask(self, message: bytes) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(message)
            self._process.stdin.flush()
            return pickle.load(self._process.stdout)  # from a process that this one has started
        except (OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise _LostError(self._process.wait()) from error
