"""Packed rows -> batches: which rows share one. A batch of r rows whose fullest has t tokens costs r·t tokens."""

from collections.abc import Sequence
from heapq import heappop, heappush

import numpy as np
from jaxtyping import Int

from dualsft.data.packing import longest_first, pack_rows

Row = list[int]
"""Ids of the examples that lie end to end in one row."""


def packed_batches(
    lengths: Sequence[int] | Int[np.ndarray, "example"],
    batch_tokens: int,
    row_tokens: int,
    batch_size: int | None = None,
    ids: Sequence[int] | None = None,
) -> list[list[Row]]:
    """Packs examples into rows and cuts the rows into batches, the fullest first: what is too large shows at once.

    Args:
        lengths: Tokens of every example, indexed by example id.
        batch_tokens: Largest (rows x fullest row) of a batch.
        row_tokens: Largest row in tokens; no row is larger than a batch either.
        batch_size: Largest number of examples of a batch, if there is to be one.
        ids: Examples to batch; all of them by default.

    Returns:
        Batches of rows of example ids; each id occurs once.

    Raises:
        UserError: If an example is longer than a row can be.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    rows = pack_rows(lengths, range(len(lengths)) if ids is None else ids, min(row_tokens, batch_tokens), batch_size)
    rows.sort(key=lambda row: -_tokens(lengths, row))
    batches: list[list[Row]] = []
    width = examples = 0
    for row in rows:
        full = not batches or (len(batches[-1]) + 1) * width > batch_tokens
        if full or (batch_size is not None and examples + len(row) > batch_size):
            batches.append([])
            width, examples = _tokens(lengths, row), 0
        batches[-1].append(row)
        examples += len(row)
    return batches


def few_packed_batches(
    lengths: Sequence[int] | Int[np.ndarray, "example"],
    batch_tokens: int,
    row_tokens: int,
    batch_size: int,
    ids: Sequence[int],
) -> list[list[Row]]:
    """Packs examples into as few batches as can be found, for training: every batch is an optimizer step.

    Full rows make few batches where tokens are the limit. Where the number of examples is, they make too many: with 11
    examples to a row and 16 to a batch, no second row fits. There the examples are first dealt out among fewer batches
    and then laid into rows, which need not be full.

    Args:
        lengths: Tokens of every example, indexed by example id.
        batch_tokens: Largest (rows x fullest row) of a batch.
        row_tokens: Largest row in tokens; no row is larger than a batch either.
        batch_size: Largest number of examples of a batch.
        ids: Examples to batch.

    Returns:
        Batches of rows of example ids; each id occurs once.

    Raises:
        UserError: If an example is longer than a row can be.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    full = packed_batches(lengths, batch_tokens, row_tokens, batch_size, ids)
    fewest = max(-(-len(ids) // batch_size), -(-_tokens(lengths, ids) // batch_tokens))
    for count in range(fewest, len(full)):
        dealt = _dealt(lengths, batch_tokens, row_tokens, _levelled(lengths, ids, count, batch_size))
        if dealt is not None:
            return dealt
    return full


def _dealt(
    lengths: Int[np.ndarray, "example"], batch_tokens: int, row_tokens: int, batches: list[list[int]]
) -> list[list[Row]] | None:
    """Each batch's examples in rows; None if the rows of a batch exceed a limit."""
    dealt: list[list[Row]] = []
    for ids in batches:
        rows = _level_rows(lengths, batch_tokens, row_tokens, ids)
        if rows is None:
            return None
        dealt.append(rows)
    return dealt


def _level_rows(
    lengths: Int[np.ndarray, "example"], batch_tokens: int, row_tokens: int, ids: list[int]
) -> list[Row] | None:
    """Few rows of nearly equal length for one batch; None if no such rows keep both limits."""
    fewest = max(1, -(-_tokens(lengths, ids) // row_tokens))
    layouts = [_levelled(lengths, ids, count) for count in range(fewest, fewest + 3)]  # still more rows only pad more
    widths = [max(_tokens(lengths, row) for row in rows) for rows in layouts]
    fitting = [
        (len(rows) * width, rows)
        for rows, width in zip(layouts, widths, strict=True)
        if width <= row_tokens and len(rows) * width <= batch_tokens
    ]
    return min(fitting)[1] if fitting else None


def _levelled(
    lengths: Int[np.ndarray, "example"], ids: Sequence[int], count: int, max_examples: int | None = None
) -> list[list[int]]:
    """Deals examples out among at most ``count`` parts, the longest first, each to the part with the fewest tokens."""
    parts: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, place) for place in range(count)]
    for example_id in longest_first(lengths, ids):
        tokens, place = heappop(heap)
        parts[place].append(example_id)
        if max_examples is None or len(parts[place]) < max_examples:
            heappush(heap, (tokens + int(lengths[example_id]), place))
    return [part for part in parts if part]


def _tokens(lengths: Int[np.ndarray, "example"], ids: Sequence[int]) -> int:
    return int(lengths[np.asarray(ids, dtype=np.int64)].sum())
