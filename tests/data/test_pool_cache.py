import errno
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from dualsft.data import cache_folder, encoded, pool_cache, rendering
from dualsft.data.encoding import encoded_chunks
from dualsft.data.examples import Examples, encode_examples
from dualsft.data.options import FormatOptions
from dualsft.data.records import read_records
from dualsft.errors import UserError
from tests.world.data import LINES, STATUS, write_jsonl
from tests.world.tokenizers import CHATML, byte_level

ABOUT = "about.json"
FILES = (ABOUT, "examples.arrow", "rows.arrow")
FIRST = "f34baf77b496f1e4fcbf84503f17b24d"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool has several chunks."""
    monkeypatch.setattr(rendering, "_CHUNK", 4)


@pytest.fixture
def pool(tmp_path: Path) -> str:
    """A pool with all statuses."""
    return write_jsonl(tmp_path / "pool.jsonl", LINES)


def encode(pool: Any, cache: Path | None, tokenizer: PreTrainedTokenizerBase | None = None, **given: Any) -> Examples:
    """The examples of a pool, with this folder as cache."""
    max_length = given.pop("max_length", 128)
    options = FormatOptions(**given)
    where = None if cache is None else str(cache)
    return encode_examples(read_records(pool), tokenizer or byte_level(), options, max_length, where)


def told(examples: Examples) -> tuple[Any, ...]:
    """All that is known of examples."""
    columns = (examples.status, examples.num_tokens.tolist(), examples.lengths.tolist(), examples.remarks)
    about = (examples.largest_id, examples.counts(), examples.dataset._fingerprint)
    return (examples.dataset[:], examples.dataset.features, *columns, *about)


def entries(cache: Path) -> list[Path]:
    """The folders of the encoded pools in a cache."""
    return sorted(place for place in cache.iterdir() if place.is_dir())


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever records are encoded."""
    count: list[int] = []

    def counted(chunks: Callable[..., Any]) -> Callable[..., Any]:
        def start(*given: Any) -> Any:
            count.append(1)
            return chunks(*given)

        return start

    monkeypatch.setattr("dualsft.data.examples.encoded_chunks", counted(encoded_chunks))
    return count


def test_what_is_found_is_what_was_encoded(pool: str, tmp_path: Path, encodings: list[int]) -> None:
    """Ids, labels, statuses, remarks and all else are the same in memory, as written, and as found again."""
    tokenizer = byte_level()
    tokenizer.eos_token = None  # which is remarked on
    plain, first, again = (encode(pool, cache, tokenizer) for cache in (None, tmp_path / "cache", tmp_path / "cache"))
    assert told(plain) == told(first) == told(again)
    assert list(plain.status) == STATUS
    assert plain.remarks
    assert len(encodings) == 2
    assert (plain.dataset.cache_files, len(again.dataset.cache_files)) == ([], 1)
    [place] = entries(tmp_path / "cache")
    assert sorted(path.name for path in place.iterdir()) == sorted(FILES)


def test_the_same_records_elsewhere(pool: str, tmp_path: Path, encodings: list[int]) -> None:
    """The place of the records is no part of the key, and messages name the place that was asked for."""
    encode(pool, tmp_path / "cache")
    other = write_jsonl(tmp_path / "other.jsonl", LINES)
    examples = encode(other, tmp_path / "cache")
    assert len(encodings) == 1
    assert examples.records.location(0).startswith("other.jsonl")
    assert any(remark.startswith("other.jsonl") for remark in examples.remarks)


def test_everything_that_decides_the_encoding_is_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other records, readings, tokenizers, lengths and versions each have an entry of their own."""
    rows = [{"prompt": "a", "response": "b", "other": "c"}, {"prompt": "d", "response": "e", "other": "f"}]
    cache, pool = tmp_path / "cache", write_jsonl(tmp_path / "pool.jsonl", rows)
    turned = write_jsonl(tmp_path / "turned.jsonl", rows[::-1])
    other_eos, chat = byte_level(), byte_level(CHATML)
    other_eos.eos_token = "<bos>"
    cases: list[tuple[Any, dict[str, Any]]] = [
        (pool, {}),
        (turned, {}),
        (pool, {"max_length": 5}),
        (pool, {"response_column": "other"}),
        ({"path": pool, "prompt_template": "{prompt}"}, {}),
        (pool, {"tokenizer": byte_level(adds="$A")}),
        (pool, {"tokenizer": other_eos}),
        (pool, {"tokenizer": chat}),
    ]
    for number, (given, options) in enumerate(cases, start=1):
        assert told(encode(given, cache, **options)) == told(encode(given, None, **options))
        assert len(entries(cache)) == number
    monkeypatch.setattr(pool_cache, "ENCODING", 0)
    encode(pool, cache)
    assert len(entries(cache)) == len(cases) + 1


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_what_is_not_whole_is_encoded_anew(pool: str, tmp_path: Path, name: str, damage: str) -> None:
    """A file that a killed process or a bad disk left is never taken for the pool."""
    expected = told(encode(pool, tmp_path / "cache"))
    [place] = entries(tmp_path / "cache")
    raw = (place / name).read_bytes()
    (place / name).unlink()
    if damage != "missing":
        middle = len(raw) // 2
        flipped = raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :]
        (place / name).write_bytes(raw[:middle] if damage == "cut" else flipped)
    assert told(encode(pool, tmp_path / "cache")) == expected
    assert (place / "examples.arrow").stat().st_size > 0
    assert told(encode(pool, tmp_path / "cache")) == expected


def test_a_mistake_in_a_row_leaves_nothing(tmp_path: Path) -> None:
    """Its sentence is the same with a cache and without, at every try, and nothing is taken for whole afterwards."""
    bad = write_jsonl(tmp_path / "pool.jsonl", [*LINES[:7], '{"prompt": 3, "response": "a"}', *LINES[7:]])
    sentences = []
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        with pytest.raises(UserError) as caught:
            encode(bad, cache)
        sentences.append(str(caught.value))
    assert "line 8 (row 7)" in sentences[0]
    assert len(set(sentences)) == 1
    assert [list(place.iterdir()) for place in entries(tmp_path / "cache")] == [[]]


def test_one_encodes_and_the_others_wait(pool: str, tmp_path: Path, encodings: list[int]) -> None:
    """Of several that ask at once, as ranks do, one encodes the pool."""
    tokenizer, records = byte_level(), read_records(pool)

    def ask(_: int) -> tuple[Any, ...]:
        return told(encode_examples(records, tokenizer, FormatOptions(), 128, str(tmp_path / "cache")))

    with ThreadPoolExecutor(3) as threads:
        results = list(threads.map(ask, range(3)))
    assert results == [told(encode(pool, None))] * 3
    assert len(encodings) == 2


def test_a_folder_that_cannot_be_one(pool: str, tmp_path: Path) -> None:
    """Where nothing can be written the pool is in memory, and one sentence says so."""
    (tmp_path / "file").write_text("")
    plain, found = encode(pool, None), encode(pool, tmp_path / "file" / "cache")
    assert told(found)[0] == told(plain)[0]
    assert found.remarks[:-1] == plain.remarks
    assert (
        "cannot be used as a cache (Not a directory), so that the encoded pool is kept in memory" in found.remarks[-1]
    )


def test_a_full_disk(pool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it is where the disk is full in the middle, of which nothing stays."""

    def write(batches: Iterable[Any], *_: Any) -> None:
        next(iter(batches))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(encoded, "_write", write)
    found = encode(pool, tmp_path / "cache")
    assert told(found)[0] == told(encode(pool, None))[0]
    assert "No space left on device" in found.remarks[-1]
    assert [list(place.iterdir()) for place in entries(tmp_path / "cache")] == [[]]


def test_what_is_done_for_large_pools_alone(pool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are cached in the home of Hugging Face's caches, encoded by several processes, and watched, unasked."""
    done: list[Any] = []

    def in_processes(*given: Any) -> Any:
        done.append(given[-1])
        return encoded_chunks(*given[:-1])

    @contextmanager
    def progress(title: str, total: float) -> Iterator[Any]:
        done.append((title, total))
        yield SimpleNamespace(advance=done.append)

    def examples() -> Examples:
        return encode_examples(read_records(pool), byte_level(), FormatOptions(), 128, progress=progress)

    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("dualsft.data.examples.available_processors", lambda: 64)
    monkeypatch.setattr("dualsft.data.examples.encoded_in_processes", in_processes)
    small = told(examples())
    assert (done, (tmp_path / "home").exists()) == ([], False)
    monkeypatch.setattr(cache_folder, "LARGE", 100)
    assert told(examples()) == small
    assert done == [8, ("encoding records", 10), 4, 4, 2]
    assert len(entries(tmp_path / "home" / "dualsft")) == 1


def test_a_change_of_the_encoding_is_another_version(pool: str) -> None:
    """Whoever changes what is made of these records raises `ENCODING`, lest caches hold what was made before."""
    assert (pool_cache.ENCODING, encode(pool, None).dataset._fingerprint) == (1, FIRST)
