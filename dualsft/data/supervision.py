"""Rendered text -> token ids and labels, for a chunk of examples at once.

All tokens of a chunk are on one axis ``token`` and all characters on one line, the texts laid end to end, so that two
binary searches say for each token of the chunk whether it overlaps a supervised span:

    overlaps(token) = #{spans that start before its end} - #{spans that end at or before its start}
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import chain, takewhile

import numpy as np
from jaxtyping import Bool, Int, Int8
from transformers import PreTrainedTokenizerBase

from dualsft.data.formats import Rendered
from dualsft.data.tokenizer import blaming_tokenizer

IGNORED = -100  # the label that torch's cross entropy leaves out
STATUSES = ("ok", "empty", "truncated")
_OK, _EMPTY, _TRUNCATED = range(3)

_Offsets = list[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Chunk:
    """Encoded and truncated examples laid end to end, with the columns of `Examples`; status as places in STATUSES.

    Attributes:
        remarks: Sentences on what a user should know of them.
    """

    input_ids: Int[np.ndarray, " token"]
    labels: Int[np.ndarray, " token"]
    lengths: Int[np.ndarray, " example"]
    num_tokens: Int[np.ndarray, " example"]
    status: Int8[np.ndarray, " example"]
    remarks: tuple[str, ...] = ()


Chunks = Generator[Chunk, None, None]
"""Chunks in order; closing it ends whatever encodes them."""


def encode_chunk(rendered: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Chunk:
    """Tokenises prompt and response together and labels the tokens that overlap a supervised span.

    The examples are of one format, and the tokenizer is a fast one; the first ``max_length`` tokens of each
    example are kept.
    """
    with blaming_tokenizer(tokenizer):
        ids, offsets = _tokenise(rendered, tokenizer)
    sizes = np.array([len(row) for row in ids], dtype=np.int64)
    flat = np.fromiter(chain.from_iterable(ids), dtype=np.int32, count=int(sizes.sum()))
    position = _positions(sizes)
    content, closing = _supervised(rendered, offsets, sizes)
    learnable = (content | closing) & (position > 0)  # nothing predicts the first token
    kept = position < max_length
    is_empty = (_row_sums(content, sizes) == 0) | (_row_sums(learnable, sizes) == 0)
    is_cut = _row_sums(learnable & kept, sizes) == 0
    status = np.where(is_empty, _EMPTY, np.where(is_cut, _TRUNCATED, _OK)).astype(np.int8)
    learnable &= np.repeat(status == _OK, sizes)
    return Chunk(
        input_ids=flat[kept],
        labels=np.where(learnable, flat, np.int32(IGNORED))[kept],
        lengths=np.minimum(sizes, max_length),
        num_tokens=_row_sums(learnable & kept, sizes),
        status=status,
    )


def _tokenise(
    rendered: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], list[_Offsets]]:
    """Tokenise to ids and character ranges; an end-of-sequence token's range is the character after its text."""
    with_special = rendered[0].add_eos
    encoding = tokenizer(
        [example.text for example in rendered],
        add_special_tokens=with_special,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    if with_special:
        start = _added_start(tokenizer)
        for row, example in enumerate(rendered):
            # a text may begin with its own, as one does that a chat template has rendered before
            if start and ids[row][: 2 * len(start)] == 2 * start and offsets[row][len(start)] != (0, 0):
                del ids[row][: len(start)], offsets[row][: len(start)]
            _close(ids[row], offsets[row], example.text, tokenizer)
    return ids, offsets


def _added_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer puts before a text."""
    encoding = tokenizer("a", return_special_tokens_mask=True)
    added = takewhile(lambda token: token[1], zip(encoding["input_ids"], encoding["special_tokens_mask"], strict=True))
    return [token for token, _ in added]


def _close(ids: list[int], offsets: _Offsets, text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Have one end-of-sequence token close the text: its own, if only white space follows that, or one behind it."""
    eos = tokenizer.eos_token_id
    if eos is None:
        return
    has_own = text.rstrip().endswith(str(tokenizer.eos_token)) and eos in ids
    if has_own and ids[-1] == eos and offsets[-1] == (0, 0):  # the tokenizer has added one
        ids.pop(), offsets.pop()
    if ids[-1:] == [eos]:
        offsets[-1] = (len(text), len(text) + 1)
    elif not has_own:
        ids.append(eos)
        offsets.append((len(text), len(text) + 1))


def _supervised(
    rendered: Sequence[Rendered], offsets: list[_Offsets], sizes: Int[np.ndarray, " example"]
) -> tuple[Bool[np.ndarray, " token"], Bool[np.ndarray, " token"]]:
    """Marks the tokens of supervised text, and the end-of-sequence tokens that close such text."""
    lengths = np.array([len(example.text) for example in rendered], dtype=np.int64)
    base = np.cumsum(lengths + 1) - (lengths + 1)  # one character more: the place of the end-of-sequence token
    start, end = _token_ranges(offsets, sizes)
    is_closing = start == np.repeat(lengths, sizes)
    shift = np.repeat(base, sizes)
    spans = np.array(
        [
            (offset + first, offset + last)
            for offset, one in zip(base, rendered, strict=True)
            for first, last in one.spans
        ],
        dtype=np.int64,
    ).reshape(-1, 2)
    begun = np.searchsorted(np.sort(spans[:, 0]), end + shift, side="left")
    over = np.searchsorted(np.sort(spans[:, 1]), start + shift, side="right")
    content = (begun > over) & (end > start) & ~is_closing
    has_spans = np.array([bool(example.spans) for example in rendered], dtype=bool)
    return content, is_closing & (end > start) & np.repeat(has_spans, sizes)


def _token_ranges(
    offsets: list[_Offsets], sizes: Int[np.ndarray, " example"]
) -> tuple[Int[np.ndarray, " token"], Int[np.ndarray, " token"]]:
    """Start and end of each token within its text.

    Some byte-level tokenizers trim white space off the ranges that they report, so that a token of spaces has an empty
    range: such a token gets the range from the end of the token before it to its own end.
    """
    flat = chain.from_iterable(chain.from_iterable(offsets))
    start, end = np.fromiter(flat, dtype=np.int64, count=2 * int(sizes.sum())).reshape(-1, 2).T
    previous = np.concatenate([np.zeros(1, np.int64), end[:-1]])[: len(end)]
    previous[_positions(sizes) == 0] = 0
    return np.where(start == end, np.minimum(previous, start), start), end


def _positions(sizes: Int[np.ndarray, " example"]) -> Int[np.ndarray, " token"]:
    ends = np.cumsum(sizes)
    return np.arange(int(sizes.sum())) - np.repeat(ends - sizes, sizes)


def _row_sums(mask: Bool[np.ndarray, " token"], sizes: Int[np.ndarray, " example"]) -> Int[np.ndarray, " example"]:
    total = np.concatenate([np.zeros(1, np.int64), np.cumsum(mask)])
    ends = np.cumsum(sizes)
    return total[ends] - total[ends - sizes]
