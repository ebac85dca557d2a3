import pickle
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dualsft.data import encoded, encoding_processes, rendering
from dualsft.data.encoding import encoded_chunks
from dualsft.data.encoding_processes import encoded_in_processes
from dualsft.data.options import FormatOptions
from dualsft.data.progress import watched
from dualsft.data.records import Records, read_records
from dualsft.data.supervision import Chunk, Chunks
from dualsft.errors import UserError
from tests.world.data import LINES, write_jsonl
from tests.world.tokenizers import CHATML, byte_level

WORKER = """
import os, pickle, sys, time

class Whatever(dict):
    def __init__(self, *given): pass
    def __setstate__(self, state): pass
    def extend(self, items): pass
    append = extend

class Reader(pickle.Unpickler):
    def find_class(self, module, name): return range if name == "range" else Whatever

def answer(what):
    pickle.dump(what, sys.stdout.buffer)
    sys.stdout.flush()

Reader(sys.stdin.buffer).load()
answer(True)
rows, lines = Reader(sys.stdin.buffer).load()
"""
"""The beginning of a program that stands for a process which encodes, and imports next to nothing."""


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool has several chunks."""
    monkeypatch.setattr(rendering, "_CHUNK", 4)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The processes that are started."""
    processes: list[Any] = []

    class Noted(subprocess.Popen):
        def __init__(self, *given: Any, **options: Any) -> None:
            super().__init__(*given, **options)
            processes.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    return processes


def work(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Has this program stand for the process that encodes."""
    monkeypatch.setattr(encoding_processes, "_COMMAND", [sys.executable, "-c", program])


def pool(folder: Path, lines: list[str]) -> Records:
    """Records of these lines, in two files that are read in two ways."""
    turns = '{"messages": [{"role": "user", "content": "the sea?"}, {"role": "assistant", "content": "wide"}]}'
    return read_records([write_jsonl(folder / "chat.jsonl", [turns] * 5), write_jsonl(folder / "pool.jsonl", lines)])


def until_a_mistake(chunks: Iterable[Chunk]) -> list[Any]:
    """What chunks hold, and the sentence in which they end."""
    found: list[Any] = []
    try:
        for chunk in chunks:
            arrays = (chunk.input_ids, chunk.labels, chunk.lengths, chunk.num_tokens, chunk.status)
            found.append([*(array.tolist() for array in arrays), chunk.remarks])
    except UserError as error:
        found.append(str(error))
    return found


@pytest.mark.slow
def test_several_processes_make_what_one_makes(tmp_path: Path, started: list[Any]) -> None:
    """So they do for chunks, remarks and a mistake's sentence and place, in order; then they end."""
    tokenizer = byte_level(CHATML)
    tokenizer.eos_token = None
    records = pool(tmp_path, [*LINES, '{"prompt": 3, "response": "a"}'])
    made_from = (records, tokenizer, FormatOptions(), 64)
    expected = until_a_mistake(encoded_chunks(*made_from))
    assert until_a_mistake(encoded_in_processes(*made_from, 2)) == expected
    assert "pool.jsonl, line 11 (row 15)" in expected[-1]
    assert len(expected) == 5
    assert [process.returncode is None for process in started] == [False, False]


def test_the_first_mistake_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[Any]) -> None:
    """Of several mistakes it is the one in the first row, whichever is found first; no process stays at work."""
    late = "time.sleep(600 if rows[0] > 4 else 0 if rows[0] else 0.3)"
    work(monkeypatch, f"{WORKER}\n{late}\nanswer((f'row {{rows[0]}}', ''))")
    with pytest.raises(UserError, match=r"^row 0$"):
        list(encoded_in_processes(pool(tmp_path, LINES), byte_level(CHATML), FormatOptions(), 64, 3))
    assert [process.returncode is None for process in started] == [False] * 3


def test_a_killed_process_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence says what it was at, and how it ended."""
    work(monkeypatch, f"{WORKER}\nos.kill(os.getpid(), 9)")
    with pytest.raises(UserError, match=r"encoded rows 0 to 3 ended too early \(exit code -9\)"):
        list(encoded_in_processes(pool(tmp_path, LINES), byte_level(CHATML), FormatOptions(), 64, 1))


@pytest.mark.parametrize("reason", ["no process can be told", "no process can encode"])
def test_this_process_encodes_where_no_other_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    """Where a tokenizer cannot be sent, or nothing be imported, the pool is encoded here."""
    tokenizer = byte_level(CHATML)
    if reason == "no process can be told":
        monkeypatch.setattr(tokenizer, "hook", lambda: None, raising=False)
        with pytest.raises((AttributeError, pickle.PicklingError)):
            pickle.dumps(tokenizer)
    work(monkeypatch, "raise SystemExit(3)")
    made_from = (pool(tmp_path, LINES), tokenizer, FormatOptions(), 64)
    assert until_a_mistake(encoded_in_processes(*made_from, 2)) == until_a_mistake(encoded_chunks(*made_from))


@pytest.mark.parametrize("stopped", ["while it is counted", "while it is written"])
def test_whoever_stops_asking_ends_what_encodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: str) -> None:
    """An interruption outside of it ends it at once, even as long as somebody holds the traceback."""
    ended: list[bool] = []

    def chunks() -> Chunks:
        try:
            yield from encoded_chunks(pool(tmp_path, LINES), byte_level(CHATML), FormatOptions(), 64)
        finally:
            ended.append(True)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    @contextmanager
    def progress(*_: Any) -> Iterator[Any]:
        yield SimpleNamespace(advance=interrupt if stopped == "while it is counted" else str)

    def write(batches: Iterator[Any], *_: Any) -> None:
        next(batches)
        interrupt()

    monkeypatch.setattr(encoded, "_write", write)
    with pytest.raises(KeyboardInterrupt) as caught:
        encoded.write_encoded(watched(chunks(), 15, progress), tmp_path / "cache")
    assert (ended, caught.tb is not None) == ([True], True)
