"""Sources: what a pool is read from, as an option gives it, with mistakes of every kind; then the pool."""

import os
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from dualsft import load_examples
from tests.fuzz.changes import VALUES, changed
from tests.fuzz.harness import Fuzzer
from tests.world.data import write_jsonl
from tests.world.tokenizers import byte_level

SOUND: list[Any] = [
    ["a.jsonl", "more/*.jsonl"],
    {"a": "a.jsonl", "b": ["more/b.jsonl", {"path": "more", "split": "train", "format": "auto"}]},
    {"path": "a.jsonl", "share": 0.5, "cap": 1, "seed": 2},
    {"a": {"path": "c.jsonl", "prompt_column": "q", "response_column": "r"}, "b": {"path": "a.jsonl", "cap": 3}},
]


@cache
def _world() -> TemporaryDirectory[str]:
    folder = TemporaryDirectory()
    (Path(folder.name) / "more").mkdir()
    write_jsonl(Path(folder.name) / "a.jsonl", [{"question": "2?", "answer": "4"}, {"question": "", "answer": ""}])
    write_jsonl(Path(folder.name) / "more" / "b.jsonl", [{"prompt": "3 + 3?", "completion": "6"}])
    write_jsonl(Path(folder.name) / "c.jsonl", [{"q": "4 + 4?", "r": "8"}])
    return folder


@st.composite
def _cases(draw: DrawFn) -> Any:
    sound = draw(st.sampled_from(SOUND))
    case = draw(st.one_of(*[changed(sound, most=1)] * 3, changed(sound), VALUES))
    return case if isinstance(case, str | list | dict) else [case]  # the types that the parser lets pass


TOKENIZER = byte_level()


def _read(case: Any, folder: Path) -> None:
    before = Path.cwd()
    os.chdir(_world().name)
    try:
        load_examples(case, TOKENIZER, max_length=64)
    finally:
        os.chdir(before)


SOURCES = Fuzzer(_cases(), _read, _world)
