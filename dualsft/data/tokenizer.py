"""Loads a tokenizer by name, and finds the id that it pads with."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dualsft.errors import UserError, first_line
from dualsft.storage.paths import expanded

_SAMPLE, _HARDLY_ANY = "The sea is deep: 1 + 2 = 3.", 8


def load_tokenizer(tokenizer: str | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Returns the tokenizer itself or the one saved under a path or hub id; code from the hub is never run.

    Raises:
        UserError: If it cannot be loaded, has no vocabulary, or cannot tell which characters a token covers.
    """
    loaded = _from_pretrained(tokenizer) if isinstance(tokenizer, str) else tokenizer
    with blaming_tokenizer(loaded):
        is_blank = _is_blank(loaded)
    if is_blank:
        raise UserError(
            f"The tokenizer {loaded.name_or_path!r} has no vocabulary: copy its tokenizer.json, tokenizer.model or "
            "vocabulary file beside its tokenizer_config.json."
        )
    if not loaded.is_fast:
        raise UserError(
            f"The tokenizer {loaded.name_or_path!r} cannot tell which characters a token covers: "
            "use one with a tokenizer.json (a 'fast' tokenizer)."
        )
    return loaded


@contextmanager
def blaming_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Turn what a tokenizer raises as it is used into a sentence: damage to its files may show only then."""
    try:
        yield
    except (UserError, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the library below is no Exception
        raise UserError(
            f"The tokenizer {tokenizer.name_or_path!r} cannot encode text ({type(error).__name__}: "
            f"{first_line(error)}); mend its files, or copy them again."
        ) from error


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with: the tokenizer's own, or any id, since padding is masked."""
    return next((int(i) for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def _is_blank(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text has no tokens and hardly any but special ones are known, as of a class without its files."""
    ids = tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"]
    if str(tokenizer.decode(ids, skip_special_tokens=True)).strip():
        return False
    return len(set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab())) <= _HARDLY_ANY


def _from_pretrained(name: str) -> PreTrainedTokenizerBase:
    folder = Path(expanded(name))
    if folder.is_dir():
        name = str(folder)
        if not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")):
            raise UserError(f"{folder} has no tokenizer: save one beside the model (tokenizer.save_pretrained).")
    try:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # missing files, bad JSON, no network, a panic: the loader fails in a dozen ways
        reason = first_line(error)
        if "backend tokenizer" in reason:  # of whose words the first line says nothing
            reason = "its vocabulary is missing (tokenizer.json, tokenizer.model or another such file)."
        raise UserError(f"No tokenizer can be loaded from {name!r}: {reason}") from error
    return loaded
