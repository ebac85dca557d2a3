"""Tokenizers: a folder whose files have lost, doubled or odd parts."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from dualsft import load_examples
from tests.fuzz.changes import changed, changed_bytes
from tests.fuzz.harness import Fuzzer
from tests.world.data import write_jsonl
from tests.world.tokenizers import CHATML, byte_level

ROWS = [{"prompt": "2 + 2", "response": "4"}]


@cache
def _sound() -> dict[str, str]:
    """Name of each file of a tokenizer -> its text."""
    with TemporaryDirectory() as folder:
        byte_level(CHATML, vocabulary=270).save_pretrained(folder)
        return {path.name: path.read_text(encoding="utf-8") for path in Path(folder).iterdir()}


@st.composite
def _cases(draw: DrawFn) -> tuple[str, bytes | None]:
    """Name of a file, and its new bytes; None if it is lost."""
    files = _sound()
    name = draw(st.sampled_from(sorted(files)))
    action = draw(st.sampled_from(["structure", "structure", "bytes", "lost"]))
    if action == "lost":
        return name, None
    if action == "bytes" or not name.endswith(".json"):
        return name, draw(changed_bytes(files[name].encode()))
    content: Any = draw(changed(json.loads(files[name])))
    return name, json.dumps(content).encode()


def _encode(case: tuple[str, bytes | None], folder: Path) -> None:
    place = folder / "tokenizer"
    place.mkdir()
    sound = {name: text.encode() for name, text in _sound().items()}
    for name, data in {**sound, case[0]: case[1]}.items():
        if data is not None:
            (place / name).write_bytes(data)
    load_examples(write_jsonl(folder / "pool.jsonl", ROWS), str(place), max_length=64)


TOKENIZERS = Fuzzer(_cases(), _encode)
