"""Loads a tokenizer by name, and finds the id that it pads with."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dualsft.errors import UserError
from dualsft.paths import expanded

_SAMPLE, _HARDLY_ANY = "The sea is deep: 1 + 2 = 3.", 8


def load_tokenizer(tokenizer: str | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Returns the tokenizer itself or the one saved under a path or hub id; code from the hub is never run.

    Raises:
        UserError: If it cannot be loaded, has no vocabulary, or cannot tell which characters a token covers.
    """
    loaded = _from_pretrained(tokenizer) if isinstance(tokenizer, str) else tokenizer
    if _is_blank(loaded):
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
    except Exception as error:  # missing files, bad JSON, no network: the loader has a dozen kinds of failure
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if "backend tokenizer" in reason:  # of whose words the first line says nothing
            reason = "its vocabulary is missing (tokenizer.json, tokenizer.model or another such file)."
        raise UserError(f"No tokenizer can be loaded from {name!r}: {reason}") from error
    return loaded
