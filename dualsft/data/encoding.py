"""Records -> encoded chunks of examples, each with what a user should know of it."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from dualsft.data.formats import Rendered
from dualsft.data.options import FormatOptions
from dualsft.data.records import Records
from dualsft.data.rendering import Rendering
from dualsft.data.supervision import Chunk, Chunks, encode_chunk

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


class Encoding:
    """Renders and tokenises records, a chunk at a time.

    Args:
        records: The records.
        tokenizer: A fast tokenizer.
        options: How records are read.
        max_length: Tokens to keep of each.

    Raises:
        UserError: If no format fits.
    """

    def __init__(
        self, records: Records, tokenizer: PreTrainedTokenizerBase, options: FormatOptions, max_length: int
    ) -> None:
        self._rendering = Rendering(records, tokenizer, options)
        self._tokenizer, self._max_length = tokenizer, max_length
        self.chunks = self._rendering.chunks

    def encoded(self, rows: range) -> Chunk:
        """Encode the records of a chunk.

        Raises:
            UserError: If one does not fit the format; its place is named.
        """
        rendered = [self._rendering.rendered(row) for row in rows]
        chunk = encode_chunk(rendered, self._tokenizer, self._max_length)
        return replace(chunk, remarks=tuple(_remarks(rendered, self._tokenizer)))


def encoded_chunks(
    records: Records, tokenizer: PreTrainedTokenizerBase, options: FormatOptions, max_length: int
) -> Chunks:
    """Renders and tokenises every record in order, a chunk at a time.

    Raises:
        UserError: If no format fits, or a record does not fit the format.
    """
    encoding = Encoding(records, tokenizer, options, max_length)
    yield from map(encoding.encoded, encoding.chunks())


def _remarks(rendered: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    if rendered[0].add_eos and tokenizer.eos_token_id is None:
        yield _NO_END
    if not all(one.has_system for one in rendered):
        yield _NO_SYSTEM
    if not all(one.has_thoughts for one in rendered):
        yield _NO_THOUGHTS
    if not all(one.has_end for one in rendered):
        yield _NO_END_OF_TURN
