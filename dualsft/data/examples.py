"""Examples: the encoded pool that both selection and fine-tuning compute on."""

import hashlib
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from dualsft.data.folders import listed
from dualsft.data.options import FormatOptions
from dualsft.data.records import Records, read_records
from dualsft.data.rendering import on_columns, rendered_chunks
from dualsft.data.sources import Given, paths_of
from dualsft.data.supervision import Chunk, encode_chunk
from dualsft.data.tokenizer import load_tokenizer
from dualsft.errors import UserError

if TYPE_CHECKING:
    import datasets

_NO_END = (
    "the tokenizer has no end-of-sequence token, so that no response ends in one and nothing teaches the model where "
    "to stop; give the tokenizer an eos_token."
)
_NO_END_OF_TURN = (
    "the chat template writes no end of turn behind an answer, or none that is learnt, so that nothing teaches the "
    "model where to stop; have it write one behind every answer, the last one too."
)
_NO_SYSTEM = (
    "the chat template does not write what the system says, so that this is no part of some examples; use a template "
    "that does, or put it in the user's turns."
)
_NO_THOUGHTS = (
    "the chat template leaves out what is thought before some answers (reasoning_content, or <think> in the content), "
    "so that this is not learnt; use a template that writes it, or one turn to a record where only the last is written."
)
STATUSES = ("ok", "empty", "truncated")


@dataclass(frozen=True, eq=False, repr=False)
class Examples:
    """A pool of n encoded examples.

    Attributes:
        dataset: Columns example_id (int64, equal to the row), input_ids and labels (lists of int32).
        status: Per example ``ok``, ``empty`` (no response) or ``truncated`` (none left within the length limit); only
            ``ok`` examples have labels.
        num_tokens: Supervised tokens per example.
        lengths: Tokens per example.
        records: The records they were made from.
        remarks: Sentences on what a user should know of them.
    """

    dataset: "datasets.Dataset"
    status: tuple[str, ...]
    num_tokens: Int[np.ndarray, "example"]
    lengths: Int[np.ndarray, "example"]
    records: Records
    remarks: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.status)

    def ok_ids(self) -> list[int]:
        """Ids of the examples that have labels, ascending."""
        return [example_id for example_id, status in enumerate(self.status) if status == "ok"]

    def largest_id(self) -> int:
        """The largest token id that occurs; -1 without tokens."""
        largest = [pc.max(chunk.flatten()).as_py() for chunk in self.dataset.data.column("input_ids").chunks]
        return max((value for value in largest if value is not None), default=-1)

    def longest(self) -> int:
        """Tokens of the longest example that has labels; 0 without any."""
        return int(self.lengths[self.ok_ids()].max(initial=0))

    def counts(self) -> dict[str, int]:
        """Number of examples of each status."""
        count = Counter(self.status)
        return {status: count[status] for status in STATUSES}


def load_examples(
    path: Given,
    tokenizer: str | PreTrainedTokenizerBase,
    *,
    split: str = "train",
    max_length: int = 2048,
    **format_options: Any,
) -> "datasets.Dataset":
    """Reads and encodes a pool as both commands train and score on it.

    Args:
        path: A jsonl, json, csv, tsv (each may be compressed), parquet or arrow file, a folder of them or of
            save_to_disk, a glob, or a Hugging Face dataset id; a list of such, or a mapping of names to them.
        tokenizer: A fast tokenizer, or the path or hub id of one.
        split: Split of a Hugging Face dataset, or of a folder with several splits.
        max_length: Tokens to keep of each example.
        **format_options: Fields of `FormatOptions`.

    Returns:
        Columns example_id (the row, over all sources), input_ids and labels; -100 marks what is not supervised.

    Raises:
        UserError: If the records, the tokenizer or the options cannot be used.
    """
    options = FormatOptions(**format_options)
    records = read_records(path, split, "path")
    if records.left_out:
        warnings.warn(f"{listed(paths_of(path))}: {listed(records.left_out)} is not read.", stacklevel=2)
    examples = encode_examples(records, load_tokenizer(tokenizer), options, max_length)
    for remark in examples.remarks:
        warnings.warn(remark, stacklevel=2)
    return examples.dataset


def encode_examples(
    records: Records, tokenizer: PreTrainedTokenizerBase, options: FormatOptions, max_length: int
) -> Examples:
    """Renders and tokenises every record, a chunk at a time.

    Raises:
        UserError: If ``max_length`` is below 2, no format fits, or a record does not fit the format.
    """
    if max_length < 2:
        raise UserError(f"data.max_length={max_length} leaves nothing to predict: it must be at least 2.")
    chunks, remarks = [], dict.fromkeys((*records.remarks, *on_columns(records, options)))
    for part in rendered_chunks(records, tokenizer, options):
        chunks.append(encode_chunk(part, tokenizer, max_length))
        if part[0].add_eos and tokenizer.eos_token_id is None:
            remarks[_NO_END] = None
        if not all(rendered.has_system for rendered in part):
            remarks[_NO_SYSTEM] = None
        if not all(rendered.has_thoughts for rendered in part):
            remarks[_NO_THOUGHTS] = None
        if not all(rendered.has_end for rendered in part):
            remarks[_NO_END_OF_TURN] = None
    return Examples(
        dataset=_dataset(chunks),
        status=tuple(status for chunk in chunks for status in chunk.status),
        num_tokens=np.concatenate([chunk.num_tokens for chunk in chunks]),
        lengths=np.concatenate([chunk.lengths for chunk in chunks]),
        records=records,
        remarks=tuple(remarks),
    )


def _dataset(chunks: list[Chunk]) -> "datasets.Dataset":
    """Wraps the arrays without a cache file.

    The fingerprint is a hash of the content: the one that `datasets` would make pickles the whole table.
    """
    import datasets  # takes most of a second, which help and configurations need not wait for

    digest = hashlib.sha256()
    for chunk in chunks:
        for array in (chunk.lengths, chunk.input_ids, chunk.labels):
            digest.update(array.tobytes())
    rows = sum(len(chunk.lengths) for chunk in chunks)
    columns = {
        "example_id": pa.array(np.arange(rows, dtype=np.int64)),
        "input_ids": pa.chunked_array([_lists(chunk.input_ids, chunk.lengths) for chunk in chunks]),
        "labels": pa.chunked_array([_lists(chunk.labels, chunk.lengths) for chunk in chunks]),
    }
    return datasets.Dataset(datasets.table.InMemoryTable(pa.table(columns)), fingerprint=digest.hexdigest()[:32])


def _lists(values: Int[np.ndarray, "token"], lengths: Int[np.ndarray, "example"]) -> pa.ListArray:
    offsets = np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int32)])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
