"""The pool and the validation sets as a LightningDataModule, configured by ``data.*`` on the command line."""

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from dualsft.data.batches import BatchIds, TrainingBatches, collate, length_batches, padding_share, tokens_in
from dualsft.data.dealing import Deal, dealt
from dualsft.data.examples import Examples, encode_examples
from dualsft.data.layout import Batch, to_device
from dualsft.data.loaders import PackedRowLists, ResumableLoader, RowLists, ScoringLoader
from dualsft.data.options import TRAIN, Format, FormatOptions, validation_key, validation_sources
from dualsft.data.packing import Ids, collate_packed, longest_first, packed_batches
from dualsft.data.progress import Progress
from dualsft.data.records import read_records
from dualsft.data.selected import selected_ids
from dualsft.data.sources import Given, sources_of
from dualsft.data.tokenizer import load_tokenizer, pad_id
from dualsft.errors import UserError, naming

ALL = slice(None)
"""All of a sequence."""
_VALIDATION = validation_key(None)


class InstructionDataModule(LightningDataModule):
    """Instruction data for selection and fine-tuning.

    Args:
        train: The pool: a jsonl, json, csv, tsv (each may be compressed), parquet or arrow file, a folder of them or of
            save_to_disk, a glob, or a Hugging Face dataset id; a list of such sources, or a mapping of names to them. A
            source may be a mapping of its path and options of its own: split, format and columns, share, cap, seed.
        validation: What the model is meant to get better at: a source of the same kinds or a list that is one set, or a
            mapping of names to several sets.
        tokenizer: A tokenizer, or the path or hub id of one; on the command line the model's own.
        format: Format of the records; ``auto`` recognises it by their columns.
        prompt_column: Column of the prompt, if not ``prompt``.
        response_column: Column of the response, if neither ``response`` nor ``completion``.
        messages_column: Column of the conversation; where no column is called ``messages``, one called
            ``conversations`` or ``conversation`` is found by itself.
        text_column: Column of plain text.
        prompt_template: Text around a prompt; must contain ``{prompt}``.
        max_length: Tokens to keep of each example, from its start.
        batch_tokens: Largest batch in tokens, padding included.
        batch_size: Largest number of examples of a training batch.
        packing: Pack several examples into one row of max_length tokens instead of padding each; attention stays
            within an example.
        train_split: Split to read if ``train`` is a Hugging Face dataset or a folder with several splits.
        validation_split: Split to read of each source of ``validation`` that is a Hugging Face dataset or a folder with
            several splits.
        selection: Directory of a finished selection: train on its selected examples alone.
        seed: Decides which examples meet in a training batch and the order of the batches.
        num_workers: Processes that prepare batches; 0 prepares them in the main process.
        cache_dir: Folder in which encoded pools and validation sets are kept for later runs; by default ``dualsft`` in
            the home of Hugging Face's caches (``HF_HOME``), and for those of 32 MiB and more alone.
        encoding_processes: Processes that tokenise; by default as many as there are processors, up to 8, for pools of
            32 MiB and more, and the main process for others.

    Attributes:
        named_validation: Whether ``validation`` is a mapping.
        progress: Shows how far the encoding of a large pool is; None shows nothing.
        part: Which rows of each training and validation batch are read, as a slice; None for all, where no others do.

    Raises:
        UserError: If an option is out of range, two contradict each other, or a source or a name cannot be one.
    """

    def __init__(
        self,
        train: Given | None = None,
        validation: Given | None = None,
        tokenizer: Any = None,
        format: Format = "auto",
        prompt_column: str | None = None,
        response_column: str | None = None,
        messages_column: str = "messages",
        text_column: str = "text",
        prompt_template: str = "{prompt}\n",
        max_length: int = 2048,
        batch_tokens: int = 8192,
        batch_size: int = 16,
        packing: bool = False,
        train_split: str = "train",
        validation_split: str = "validation",
        selection: str | None = None,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | None = None,
        encoding_processes: int | None = None,
    ) -> None:
        super().__init__()
        _at_least(2, max_length=max_length)
        _at_least(1, batch_tokens=batch_tokens, batch_size=batch_size)
        _at_least(0, seed=seed, num_workers=num_workers)
        self.options = FormatOptions(
            format, prompt_column, response_column, messages_column, text_column, prompt_template
        )
        self.max_length, self.batch_tokens, self.batch_size = max_length, batch_tokens, batch_size
        self.packing, self.selection, self.seed, self.num_workers = packing, selection, seed, num_workers
        if encoding_processes is not None:
            _at_least(1, encoding_processes=encoding_processes)
        self.cache_dir, self.encoding_processes = cache_dir, encoding_processes
        self.progress: Progress | None = None
        self.part: slice | None = None
        self.train, self.train_split, self.validation = train, train_split, validation
        self.named_validation = isinstance(validation, dict)
        paths = validation_sources(validation)
        self._keys = {name: validation_key(name if self.named_validation else None) for name in paths}
        self._sources: dict[str, tuple[Given | None, str]] = {
            TRAIN: (train, train_split),
            _VALIDATION: (None, validation_split),
            **{key: (paths[name], validation_split) for name, key in self._keys.items()},
        }
        for key, (given, _) in self._sources.items():
            if given is not None:
                sources_of(given, key, samples=key == TRAIN)
        self._tokenizer = tokenizer
        self._examples: dict[str, Examples] = {}

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded on first use."""
        if self._tokenizer is None:
            raise UserError("data.tokenizer is not given: name a model or a tokenizer.")
        self._tokenizer = load_tokenizer(self._tokenizer)
        return self._tokenizer

    @property
    def train_examples(self) -> Examples:
        """The pool, encoded on first use."""
        return self._encoded(TRAIN)

    @property
    def validation_sets(self) -> dict[str, Examples]:
        """The validation sets by name, in the order given, each encoded on first use.

        A single source has the name ``validation``; without a source there is no set.
        """
        return {name: self._encoded(key) for name, key in self._keys.items()}

    @property
    def encoded(self) -> dict[str, Examples]:
        """What has been encoded so far, by the option that gives its source."""
        return dict(self._examples)

    def setup(self, stage: str | None = None) -> None:
        """Reads and encodes the data that a stage needs, once.

        Args:
            stage: ``fit`` needs the pool and takes the validation sets there are, ``validate`` needs a validation set,
                and anything else needs both.

        Raises:
            UserError: If a source cannot be used, or a fit would have nothing to train on.
        """
        # Batches come from memory and cost about a millisecond: Lightning's advice on workers does not apply.
        warnings.filterwarnings("ignore", message="The '.*_dataloader' does not have many workers")
        if not self._keys:  # Lightning knows no quieter way of having no validation loader
            warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
        validation = list(self._keys.values())
        if not validation and stage != "fit":
            validation = [_VALIDATION]  # which is refused as not given
        needed = validation if stage == "validate" else [TRAIN, *validation]
        for key in sorted(needed, key=lambda key: self._sources[key][0] is not None):  # missing ones cost no reading
            self._encoded(key)
        # some mistakes show only when batches are cut
        if TRAIN in self._examples:
            _ = self.train_dataloader() if stage == "fit" else self.pool_loader()
        for name in self._keys:
            self.validation_loader(name)

    def train_dataloader(self) -> ResumableLoader:
        """Training batches over the examples of `training_ids`."""
        return self.training_loader(self.training_ids(), self.seed, part=self.part)

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Validation batches, never packed; this process's rows of each, if others share them.

        Returns:
            A loader, or a list with one for each set in the order of `validation_sets` if there are several; an empty
            list, which Lightning passes over, without a validation set.
        """
        loaders: list[DataLoader[Any]] = [
            self._scoring_loader(key, packing=False, rows=self.part) for key in self._keys.values()
        ]  # metrics want a mask
        return loaders[0] if len(loaders) == 1 else loaders

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """The batch on the device, and still known to the host."""
        return to_device(batch, device)

    def training_loader(
        self, ids: Ids, seed: int, validation: str | None = None, part: slice | None = None
    ) -> ResumableLoader:
        """Shuffled training batches over some examples of the pool, or of a validation set of this name.

        Of each batch all rows are read, or a part of them, if others share it (`DealtBatch`).
        """
        examples = self._encoded(TRAIN if validation is None else self._keys[validation])
        row_tokens = self.max_length if self.packing else None
        batches = TrainingBatches(examples.lengths, ids, self.batch_tokens, self.batch_size, seed, row_tokens)
        loader = ResumableLoader(sampler=batches, **self._loader_options(examples, self.packing))
        loader.deal = _deal(examples, part)
        return loader

    def pool_loader(
        self, ids: Ids | None = None, start: int = 0, batch_tokens: int | None = None, part: slice = ALL
    ) -> DataLoader[Batch]:
        """Batches for scoring over some examples of the pool, the longest first.

        Args:
            ids: The examples; by default all that have labels.
            start: Number of batches to skip at the start; they are not read.
            batch_tokens: Largest batch in tokens, if not ``data.batch_tokens``.
            part: Which of the examples, in the order of their lengths, to take; the others are not read.
        """
        return self._scoring_loader(TRAIN, self.packing, ids, start, batch_tokens, part)

    def validation_loader(
        self,
        name: str = "validation",
        start: int = 0,
        batch_tokens: int | None = None,
        part: slice = ALL,
        ids: Ids | None = None,
    ) -> DataLoader[Batch]:
        """Batches for scoring over a set in `validation_sets`, all that have labels or some; see `pool_loader`.

        Args:
            name: The set's.
            start: As that of `pool_loader`, and so the next two.
            batch_tokens: Largest batch in tokens.
            part: Which of the examples to take.
            ids: The examples.
        """
        return self._scoring_loader(self._keys[name], self.packing, ids, start, batch_tokens, part)

    def padding_share(self) -> float:
        """Share of the token slots of the pool's scoring batches that hold padding; no batch is made for it."""
        batches = cast(Sequence[BatchIds], self.pool_loader().sampler)
        return padding_share(self.train_examples.lengths, batches)

    def training_padding_share(self) -> float:
        """Share of the token slots of the training batches that hold padding; no batch is made for it."""
        batches = cast(TrainingBatches, self.train_dataloader().sampler)
        return padding_share(self.train_examples.lengths, batches)

    def _encoded(self, key: str) -> Examples:
        if key not in self._examples:
            given, split = self._sources[key]
            if given is None:
                raise UserError(f"{key} is not given: name a file, a folder or a Hugging Face dataset id.")
            tokenizer = self.tokenizer  # outside `_naming_set`: its errors are not about the source
            with _naming_set(key):
                records = read_records(given, split, cache_dir=self.cache_dir)
                how = (self.options, self.max_length, self.cache_dir, self.encoding_processes, self.progress)
                self._examples[key] = encode_examples(records, tokenizer, *how)
        return self._examples[key]

    def _scoring_loader(
        self,
        key: str,
        packing: bool,
        ids: Ids | None = None,
        start: int = 0,
        batch_tokens: int | None = None,
        part: slice = ALL,
        rows: slice | None = None,
    ) -> ScoringLoader:
        examples = self._encoded(key)
        chosen = longest_first(examples.lengths, np.flatnonzero(examples.is_ok()) if ids is None else ids)[part]
        most = self.batch_tokens if batch_tokens is None else batch_tokens
        batches: Sequence[BatchIds]
        with _naming_set(key):
            if packing:
                batches = packed_batches(examples.lengths, most, self.max_length, ids=chosen)
            else:
                batches = length_batches(examples.lengths, most, ids=chosen)
        options = dealt(self._loader_options(examples, packing), _deal(examples, rows))
        loader = ScoringLoader(sampler=batches[start:], **options)
        loader.skipped_tokens = tokens_in(examples.lengths, batches[:start])
        loader.all_tokens = loader.skipped_tokens + tokens_in(examples.lengths, batches[start:])
        return loader

    def _loader_options(self, examples: Examples, packing: bool) -> dict[str, Any]:
        """The arguments of a `DataLoader` except its sampler."""
        # padding is masked, so that any id will do that has an embedding, as those of the data must
        padding = max(0, min(pad_id(self.tokenizer), examples.largest_id))
        return {
            "dataset": (PackedRowLists if packing else RowLists)(examples.dataset),
            "batch_size": None,
            "collate_fn": partial(collate_packed if packing else collate, pad_token_id=padding),
            "num_workers": self.num_workers,
        }

    def training_ids(self) -> list[int]:
        """Ids of the examples to train on: those with labels, and in the selection if one is given.

        Raises:
            UserError: If none is left.
        """
        examples = self.train_examples
        ids = examples.ok_ids()
        if self.selection is not None:
            ids = sorted(set(ids) & set(selected_ids(self.selection, examples.records)))
        if not ids:
            counts = ", ".join(f"{count} {status}" for status, count in examples.counts().items())
            raise UserError(f"No example of data.train is left to train on ({counts}, before any selection).")
        return ids


def _deal(examples: Examples, rows: slice | None) -> Deal | None:
    return None if rows is None else Deal(rows, examples.lengths, examples.num_tokens)


def _naming_set(key: str) -> AbstractContextManager[None]:
    """Says which of several validation sets a mistake is in."""
    return nullcontext() if key in (TRAIN, _VALIDATION) else naming(key)


def _at_least(least: int, **values: int) -> None:
    for key, value in values.items():
        if value < least:
            raise UserError(f"data.{key}={value} is too small: it must be at least {least}.")
