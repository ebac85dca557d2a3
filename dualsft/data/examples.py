"""Examples: the encoded pool that both selection and fine-tuning compute on."""

import warnings
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
from jaxtyping import Bool, Int, Int8
from transformers import PreTrainedTokenizerBase

from dualsft.data.encoding import encoded_chunks
from dualsft.data.encoding_processes import available_processors, encoded_in_processes
from dualsft.data.folders import listed
from dualsft.data.options import FormatOptions
from dualsft.data.pool_cache import encoded_pool, pool_key
from dualsft.data.progress import Progress, watched
from dualsft.data.records import Records, read_records
from dualsft.data.rendering import on_columns
from dualsft.data.sources import Given, paths_of
from dualsft.data.supervision import STATUSES, Chunks
from dualsft.data.tokenizer import load_tokenizer
from dualsft.errors import UserError

if TYPE_CHECKING:
    import datasets


_MOST = 8  # processes that encode unasked: each takes some 300 MB


@dataclass(frozen=True, eq=False, repr=False)
class Examples:
    """A pool of n encoded examples.

    Attributes:
        dataset: Columns example_id (int64, equal to the row), input_ids and labels (lists of int32).
        status_codes: Per example the place of its status among ``status_names``: ``ok``, ``empty`` (no response) or
            ``truncated`` (none left within the length limit). Only ``ok`` examples have labels.
        num_tokens: Supervised tokens per example.
        lengths: Tokens per example.
        records: The records they were made from.
        remarks: Sentences on what a user should know of them.
        status_names: The names of the statuses, of which ``ok`` is the first.
    """

    dataset: "datasets.Dataset"
    status_codes: Int8[np.ndarray, " example"]
    num_tokens: Int[np.ndarray, " example"]
    lengths: Int[np.ndarray, " example"]
    records: Records
    remarks: tuple[str, ...] = ()
    status_names: tuple[str, ...] = STATUSES

    def __len__(self) -> int:
        return len(self.status_codes)

    @property
    def status(self) -> tuple[str, ...]:
        """The name of each example's status, anew at every use."""
        return tuple(np.array(self.status_names, dtype=object)[self.status_codes])

    def is_ok(self) -> Bool[np.ndarray, " example"]:
        """Whether each example has labels."""
        return self.status_codes == 0

    def ok_ids(self) -> list[int]:
        """Ids of the examples that have labels, ascending."""
        ids: list[int] = np.flatnonzero(self.is_ok()).tolist()
        return ids

    @cached_property
    def largest_id(self) -> int:
        """The largest token id that occurs; -1 without tokens."""
        largest = [pc.max(chunk.flatten()).as_py() for chunk in self.dataset.data.column("input_ids").chunks]
        return max((value for value in largest if value is not None), default=-1)

    def longest(self) -> int:
        """Tokens of the longest example that has labels; 0 without any."""
        return int(self.lengths[self.is_ok()].max(initial=0))

    def counts(self) -> dict[str, int]:
        """Number of examples of each status that encoding gives."""
        counts = np.bincount(self.status_codes, minlength=len(self.status_names)).tolist()
        return dict(zip(STATUSES, counts, strict=False))


def load_examples(
    path: Given,
    tokenizer: str | PreTrainedTokenizerBase,
    *,
    split: str = "train",
    max_length: int = 2048,
    cache_dir: str | None = None,
    **format_options: Any,
) -> "datasets.Dataset":
    """Reads and encodes a pool as both commands train and score on it.

    Args:
        path: A jsonl, json, csv, tsv (each may be compressed), parquet or arrow file, a folder of them or of
            save_to_disk, a glob, or a Hugging Face dataset id; a list of such, or a mapping of names to them.
        tokenizer: A fast tokenizer, or the path or hub id of one.
        split: Split of a Hugging Face dataset, or of a folder with several splits.
        max_length: Tokens to keep of each example.
        cache_dir: Folder of the cache of encoded pools; None for the default's, and for large pools only.
        **format_options: Fields of `FormatOptions`.

    Returns:
        Columns example_id (the row, over all sources), input_ids and labels; -100 marks what is not supervised.

    Raises:
        UserError: If the records, the tokenizer or the options cannot be used.
    """
    options = FormatOptions(**format_options)
    records = read_records(path, split, "path", cache_dir)
    if records.left_out:
        warnings.warn(f"{listed(paths_of(path))}: {listed(records.left_out)} is not read.", stacklevel=2)
    examples = encode_examples(records, load_tokenizer(tokenizer), options, max_length, cache_dir)
    for remark in examples.remarks:
        warnings.warn(remark, stacklevel=2)
    return examples.dataset


def encode_examples(
    records: Records,
    tokenizer: PreTrainedTokenizerBase,
    options: FormatOptions,
    max_length: int,
    cache_dir: str | None = None,
    processes: int | None = None,
    progress: Progress | None = None,
) -> Examples:
    """Renders and tokenises every record, or finds them in the cache.

    Args:
        records: The records.
        tokenizer: A fast tokenizer.
        options: How they are read.
        max_length: Tokens to keep of each.
        cache_dir: Folder of the cache; None for the default's, and for large pools only.
        processes: How many encode; None for up to 8 where the pool is large, else this one.
        progress: Shows the progress of large pools; None shows none.

    Raises:
        UserError: If ``max_length`` is below 2, no format fits, or a record does not fit the format.
    """
    if max_length < 2:
        raise UserError(f"data.max_length={max_length} leaves nothing to predict: it must be at least 2.")
    remarks = (*records.remarks, *on_columns(records, options))
    made_from = (records, tokenizer, options, max_length)

    def chunks() -> Chunks:
        count = processes or (min(available_processors(), _MOST) if records.is_large else 1)
        made = encoded_chunks(*made_from) if count == 1 else encoded_in_processes(*made_from, count)
        return watched(made, len(records), progress) if progress and records.is_large else made

    encoded = encoded_pool(partial(pool_key, *made_from), chunks, records.is_large, cache_dir)
    return Examples(
        dataset=encoded.dataset,
        status_codes=encoded.status,
        num_tokens=encoded.num_tokens,
        lengths=encoded.lengths,
        records=records,
        remarks=tuple(dict.fromkeys((*remarks, *encoded.remarks))),
    )
