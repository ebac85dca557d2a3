"""The cache of encoded pools: a folder with one of `dualsft.data.encoded` for each key, a hash of all it was made from.

KEY/         the encoded pool
KEY.lock     held by the process that encodes it, while others wait
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from dualsft.data import cache_folder
from dualsft.data.encoded import Encoded, in_memory, read_encoded, write_encoded
from dualsft.data.options import FormatOptions
from dualsft.data.reading import readings
from dualsft.data.records import Records
from dualsft.data.supervision import Chunks
from dualsft.models.loading import tokenizer_fingerprint

ENCODING = 1
"""Version of what is made of records: raise it with every change after which an encoded pool is another."""
_PACKAGES = ("dualsft", "transformers", "tokenizers", "jinja2")
REFUSALS = (OSError, NotImplementedError, pa.ArrowException)
"""What a folder that cannot be written raises; the second where a file system has no locks."""


def encoded_pool(
    key: Callable[[], str], chunks: Callable[[], Chunks], is_large: bool, cache_dir: str | None
) -> Encoded:
    """The examples of a pool: from the cache, into it, or in memory alone where the pool is small or nothing else goes.

    Args:
        key: Computes the pool's key.
        chunks: Encodes it from its start.
        is_large: Whether it is cached unasked.
        cache_dir: The cache's folder; None for the default's, and for large pools only.
    """
    if cache_dir is None and not is_large:
        return in_memory(chunks())
    folder = cache_folder.cache_folder(cache_dir)
    try:
        return _cached(folder, key(), chunks)
    except REFUSALS as error:
        remark = cache_folder.refused(
            folder, error, "the encoded pool is kept in memory, and encoded anew in every run"
        )
    encoded = in_memory(chunks())
    return replace(encoded, remarks=(*encoded.remarks, remark))


def _cached(folder: Path, key: str, chunks: Callable[[], Chunks]) -> Encoded:
    """The examples under a key, encoded by whichever process asks first; a killed one's are encoded anew."""
    place = folder / key
    if (found := read_encoded(place)) is not None:  # one may read where one may not write
        return found
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{key}.lock", fallback_to_soft=False):
        if (found := read_encoded(place)) is None:
            write_encoded(chunks(), place)
            found = read_encoded(place)
    if found is None:
        raise OSError(0, "what is written there reads otherwise")
    return found


def pool_key(records: Records, tokenizer: PreTrainedTokenizerBase, options: FormatOptions, max_length: int) -> str:
    """A hash of all that decides how records are encoded: their lines, how each file is read, and by what."""
    parts = zip(records.parts, readings(records, options), strict=True)
    made_from = {
        "version": [ENCODING, *map(version, _PACKAGES)],
        "records": records.fingerprint,
        "parts": [[part.start, part.number, *reading[1:], asdict(reading.options)] for part, reading in parts],
        "tokenizer": _tokenizer(tokenizer),
        "max_length": max_length,
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """What a tokenizer's tokens depend on: its rules and chat template, and what its class does around them."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    splits = bool(getattr(tokenizer, "split_special_tokens", False))
    return [tokenizer_fingerprint(tokenizer), type(tokenizer).__qualname__, special, tokenizer.eos_token_id, splits]
