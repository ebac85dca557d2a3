"""Data: records -> text with supervised spans -> encoded examples -> batches."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dualsft.data.batches import TrainingBatches, collate, length_batches, padding_share
    from dualsft.data.examples import Examples, encode_examples, load_examples
    from dualsft.data.layout import Batch
    from dualsft.data.loaders import KeepEpochCount, ResumableLoader
    from dualsft.data.module import InstructionDataModule
    from dualsft.data.options import FormatOptions
    from dualsft.data.packed_batches import packed_batches
    from dualsft.data.packing import collate_packed, pack_rows
    from dualsft.data.records import Records, read_records
    from dualsft.data.selected import selected_ids
    from dualsft.data.sources import validation_key, validation_sources
    from dualsft.data.texts import record_text
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

_MODULES = {
    "layout": ("Batch",),
    "batches": ("TrainingBatches", "collate", "length_batches", "padding_share"),
    "examples": ("Examples", "encode_examples", "load_examples"),
    "loaders": ("KeepEpochCount", "ResumableLoader"),
    "module": ("InstructionDataModule",),
    "options": ("FormatOptions",),
    "packed_batches": ("packed_batches",),
    "packing": ("collate_packed", "pack_rows"),
    "records": ("Records", "read_records"),
    "selected": ("selected_ids",),
    "sources": ("validation_key", "validation_sources"),
    "texts": ("record_text",),
    "tokenizer": ("load_tokenizer",),
}
"""Module -> the names above that it defines; imported when first used, as layouts of batches need no libraries."""


def __getattr__(name: str) -> Any:
    """Import a name from where it is defined (PEP 562)."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
