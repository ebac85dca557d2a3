"""Every record of a pool -> text with supervised spans, each file by the renderer that its reading asks for."""

from collections.abc import Iterator
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from dualsft.data.folders import listed
from dualsft.data.formats import Rendered, Renderer, make_renderer, read_columns
from dualsft.data.options import FormatOptions
from dualsft.data.reading import Reading, readings
from dualsft.data.records import Records
from dualsft.errors import UserError, clipped

_CHUNK = 512  # records tokenised at once: enough to keep the tokenizer's threads busy, little enough to be cheap


def on_columns(records: Records, options: FormatOptions) -> Iterator[str]:
    """A sentence on each set of columns that is not read, with the files that have it."""
    files: dict[tuple[str, ...], dict[str, None]] = {}
    for part, reading in zip(records.parts, readings(records, options), strict=True):
        read = read_columns(reading, records[part.start])
        names = tuple(column for column in part.columns if column not in read)
        files.setdefault(names, {})[part.title] = None
    for names, titles in files.items():
        if names:
            of = f"column {names[0]} is" if len(names) == 1 else f"columns {listed(names)} are"
            yield clipped(f"{listed(tuple(titles))}: the {of} no part of the text that is learnt from.")


class Rendering:
    """Renders the records of a pool, each by the renderer of its part.

    Args:
        records: The records; the first of each part decides on its renderer.
        tokenizer: The tokenizer, for its chat template and its special tokens.
        options: How records are read.

    Raises:
        UserError: If no format fits.
    """

    def __init__(self, records: Records, tokenizer: PreTrainedTokenizerBase, options: FormatOptions) -> None:
        self._records, self._renderers = records, _renderers(records, tokenizer, options)

    def chunks(self) -> Iterator[range]:
        """The rows of all records in order, some hundred at a time, all of which are read in one way."""
        pairs = list(zip(self._records.parts, self._renderers, strict=True))
        starts = [part.start for k, (part, own) in enumerate(pairs) if k == 0 or own is not pairs[k - 1][1]]
        for start, end in pairwise([*starts, len(self._records)]):
            for first in range(start, end, _CHUNK):
                yield range(first, min(first + _CHUNK, end))

    def rendered(self, row: int) -> Rendered:
        """Render a record.

        Raises:
            UserError: If it does not fit the format; its place is named.
        """
        where = self._records.location(row)
        return _checked(self._renderers[self._records.part(row)](self._records[row], where), where)


def _renderers(records: Records, tokenizer: PreTrainedTokenizerBase, options: FormatOptions) -> list[Renderer]:
    """The renderer of each part: files of one source that are read in one way share theirs."""
    made: dict[tuple[tuple[int, ...], Reading], Renderer] = {}
    parts = list(zip(records.parts, readings(records, options), strict=True))
    for part, reading in parts:
        if (part.number, reading) not in made:
            made[part.number, reading] = make_renderer(reading, records[part.start], tokenizer)
    return [made[part.number, reading] for part, reading in parts]


def _checked(rendered: Rendered, where: str) -> Rendered:
    try:
        rendered.text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: the text holds half a character (a lone surrogate); mend or remove it.") from error
    return rendered
