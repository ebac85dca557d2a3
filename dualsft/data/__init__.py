"""Data, from files to batches.

In: the files, folders or Hugging Face datasets that ``data.*`` names, and a tokenizer. Out: `Examples`, which are
records rendered to text with supervised spans and encoded, and loaders of padded or packed batches of them.
"""

from dualsft.data.batches import TrainingBatches, collate, length_batches, padding_share
from dualsft.data.examples import Examples, encode_examples, load_examples
from dualsft.data.layout import Batch
from dualsft.data.loaders import KeepEpochCount, ResumableLoader
from dualsft.data.module import InstructionDataModule
from dualsft.data.options import FormatOptions, validation_key, validation_sources
from dualsft.data.packing import collate_packed, pack_rows, packed_batches
from dualsft.data.records import Records, read_records, record_text
from dualsft.data.selected import selected_ids
from dualsft.data.tokenizer import load_tokenizer

__all__ = [
    "Batch",
    "Examples",
    "FormatOptions",
    "InstructionDataModule",
    "KeepEpochCount",
    "Records",
    "ResumableLoader",
    "TrainingBatches",
    "collate",
    "collate_packed",
    "encode_examples",
    "length_batches",
    "load_examples",
    "load_tokenizer",
    "pack_rows",
    "packed_batches",
    "padding_share",
    "read_records",
    "record_text",
    "selected_ids",
    "validation_key",
    "validation_sources",
]
