"""A selection as the page looks at it: its scores in order, and the records behind them where they are at hand."""

import math
from collections.abc import Callable, Sequence
from contextlib import chdir
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Int

from dualsft.data.records import Records
from dualsft.data.tokenizer import load_tokenizer
from dualsft.errors import UserError
from dualsft.reports.selections.pool import Pool, find_pool
from dualsft.reports.sources import Source
from dualsft.reports.words import Unit
from dualsft.selection import Selection, load_selection
from dualsft.selection.diagnostics.examples import Rows
from dualsft.selection.example_tokens import TokenScores

ComputeTokens: TypeAlias = Callable[[Selection, Sequence[int]], TokenScores]
_NEAR = 0.02  # of scores that were computed twice, relative to their own size or to the largest


class Subject:
    """A selection on the page.

    Args:
        source: Its directory.
        file_name: What the files of its figures begin with.
        compute_tokens: Computes scores by token of some examples, where the selection kept none; None leaves it.

    Attributes:
        name: What the page calls it.
        selection: The selection.
        about: Its manifest.
        rows: Its examples as arrays.

    Raises:
        UserError: if it is not finished, or damaged.
    """

    def __init__(self, source: Source, file_name: str, compute_tokens: ComputeTokens | None = None) -> None:
        self.name, self.file_name, self._compute_tokens = source.name, file_name, compute_tokens
        self.selection = load_selection(source.folder)
        self.about = self.selection.about
        self.rows = Rows(self.selection.examples)

    @cached_property
    def order(self) -> Int[np.ndarray, " scored"]:
        """The scored examples' row numbers, the highest score first, ties in the order of the rows."""
        ids = np.flatnonzero(self.rows.scored)
        found: Int[np.ndarray, " scored"] = ids[np.argsort(-self.rows.score[ids], kind="stable")]
        return found

    @cached_property
    def places(self) -> dict[int, int]:
        """Row number -> its place in that order, from 1."""
        return {int(row): place for place, row in enumerate(self.order, 1)}

    @cached_property
    def unit(self) -> Unit:
        """The unit that this selection's scores are shown in."""
        return Unit.of(self._largest)

    def shown(self, value: float | None, digits: int = 3) -> str:
        """A score in that unit."""
        return self.unit.show(None if value is None else float(value), digits)

    @cached_property
    def cut(self) -> float | None:
        """The lowest score of a chosen example; None if none is chosen, or all."""
        chosen = self.rows.selected & self.rows.scored
        if not chosen.any() or chosen.sum() == self.rows.scored.sum():
            return None
        return float(self.rows.score[chosen].min())

    @cached_property
    def is_cut_clean(self) -> bool:
        """Whether every chosen example has a higher score than all others, or the same."""
        others = self.rows.score[self.rows.scored & ~self.rows.selected]
        return self.cut is not None and bool((others <= self.cut).all())

    def tokens(self, rows: Sequence[int]) -> TokenScores:
        """Row -> its token ids and their scores: as kept, or computed if asked for; empty otherwise.

        Raises:
            UserError: if they cannot be computed, or do not add up to the scores that were kept.
        """
        if (table := self.selection.token_scores_of(rows)) is not None:
            return {row["example_id"]: (row["token_id"], row["score"]) for row in table.to_pylist()}
        if self._compute_tokens is None:
            return {}
        selection = replace(self.selection, folder=self.selection.folder.absolute())
        with chdir(self._found.directory):
            found = self._compute_tokens(selection, rows)
        for row, (_, scores) in found.items():
            if not math.isclose(sum(scores), self.rows.score[row], rel_tol=_NEAR, abs_tol=_NEAR * self._largest):
                raise UserError(
                    f"The scores by token of example {row:,} add up to {sum(scores):.4g}, where {self.name} has "
                    f"{self.rows.score[row]:.4g}: the model, the data or the settings are not those of the selection."
                )
        return found

    @cached_property
    def _largest(self) -> float:
        return float(np.abs(self.rows.score[self.rows.scored]).max(initial=0.0))

    @cached_property
    def _found(self) -> Pool:
        return find_pool(self.selection)

    @property
    def pool(self) -> tuple[Records | None, str]:
        """The records that were chosen from, if they are where they were and as they were; otherwise why not."""
        return self._found.records, self._found.lack

    def tokenizer(self) -> Any:
        """The base model's tokenizer.

        Raises:
            UserError: if it cannot be loaded.
        """
        with chdir(self._found.directory):
            return load_tokenizer(self.about.model.name_or_path)

    def record(self, row: int) -> dict[str, Any] | None:
        """A record: from the pool, or of a chosen one from the selection's own copy; None if neither has it."""
        if self.pool[0] is not None:
            return self.pool[0][row]
        return self._chosen.get(row)

    @cached_property
    def _chosen(self) -> dict[int, dict[str, Any]]:
        return dict(zip(self.selection.example_ids, self.selection.records, strict=True))

    def source(self, row: int) -> str:
        """Where a record comes from: its column that says so, or its file where there are several; empty if neither."""
        sources = self.selection.diagnostics.sources
        if sources is None:
            return ""
        if (pool := self.pool[0]) is not None and sources.column is None:
            return pool.source_of(row)
        record = self._chosen.get(row, {}) if pool is None else pool.with_source(row)
        value = record.get(sources.column or "")
        return "" if value is None else str(value)
