"""Loading a causal language model safely, and fingerprints of weights and tokenizers."""

import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from dualsft.errors import UserError
from dualsft.models import PreTrainedModel
from dualsft.models.index import read_index
from dualsft.models.inspection import check_files, check_weights, explaining_load, read_config, reason
from dualsft.models.rope import separate_frequencies
from dualsft.storage.hub import OFFLINE, cache_alone_when_offline
from dualsft.storage.paths import expanded

Dtype = Literal["auto", "float32", "bfloat16", "float64"]

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def model_folder(name_or_path: str) -> Path:
    """The local folder of a model: itself, or the hub's snapshot of it.

    Raises:
        UserError: if there is no such folder and the hub has no such model, if the folder lacks ``config.json`` or
            safetensors weights (pickled ``*.bin`` weights are never read), or if `check_files` refuses it.
    """
    folder = Path(expanded(name_or_path))
    if not folder.is_dir():
        folder = _download(name_or_path)
    check_files(folder)
    if not any((folder / name).is_file() for name in (_WEIGHTS, _INDEX)):
        found = "only pickled weights (*.bin), which are not read" if list(folder.glob("*.bin")) else "no weights"
        raise UserError(f"{folder} has {found}; give a folder with {_WEIGHTS} (save_pretrained writes it).")
    if not (folder / _WEIGHTS).is_file():
        read_index(folder / _INDEX)
    return folder


def _download(name: str) -> Path:
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{name}: no such folder; give a local Hugging Face model folder or a hub id.")
    with cache_alone_when_offline() as offline:
        try:
            return Path(snapshot_download(name, allow_patterns=_FILES))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            why = OFFLINE if offline and isinstance(error, LocalEntryNotFoundError) else reason(error)
            raise UserError(f"{name} is neither a local folder nor a model that the hub gives us ({why}).") from error


def load_model(name_or_path: str, dtype: Dtype = "auto") -> PreTrainedModel:
    """Load a causal language model from safetensors weights, without remote code.

    Args:
        name_or_path: A Hugging Face model folder or hub id.
        dtype: Type to store the weights in; ``auto`` keeps the checkpoint's.

    Raises:
        UserError: if the folder is not a loadable causal language model, or its weights are incomplete or quantised.
    """
    folder = model_folder(name_or_path)
    read_config(folder)
    # the caller moves the model; under a device context the loader would place the weights itself
    with explaining_load(folder), torch.device("cpu"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
        )
    model, info = loaded
    check_weights(folder, model, info)
    separate_frequencies(model)
    return model


def base_weights(name_or_path: str, dtype: Dtype = "auto") -> dict[str, Tensor]:
    """The parameters of a model by name, on the host."""
    return {name: parameter.detach() for name, parameter in load_model(name_or_path, dtype).named_parameters()}


def checkpoint_activations(model: PreTrainedModel, **options: Any) -> None:
    """Turn on activation checkpointing in training mode, with these options of `torch.utils.checkpoint`.

    Raises:
        UserError: if its architecture does not support that.
    """
    if not model.supports_gradient_checkpointing:
        raise UserError(
            f"{type(model).__name__} cannot recompute activations; set model.gradient_checkpointing to false."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # renamed in 5.23, yet all of 5 has the old name
        model.gradient_checkpointing_enable({"use_reentrant": False, **options})
    # undo what makes the embeddings' outputs require gradients: only re-entrant checkpoints need it, and forward-mode
    # derivatives fail with it; releases that do not do it raise AttributeError
    with suppress(AttributeError):
        model.disable_input_require_grads()


def parameter_shapes(name_or_path: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's parameters by name, from its configuration alone."""
    return {name: tuple(parameter.shape) for name, parameter in empty_model(name_or_path).named_parameters()}


def empty_model(name_or_path: str) -> PreTrainedModel:
    """A causal language model on the meta device, without weights, from its configuration."""
    folder = model_folder(name_or_path)
    config = read_config(folder)
    with explaining_load(folder), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def model_fingerprint(name_or_path: str) -> str:
    """SHA-256 over a model's stored weights in the order of their names; independent of how the files are sharded."""
    folder, digest = model_folder(name_or_path), hashlib.sha256()
    with reading_weights(folder):
        for name, path in sorted(weight_files(folder).items()):
            with safe_open(path, framework="pt") as stored:
                tensor = stored.get_tensor(name)
            digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weight_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor of a model, by name; safetensors files that do not belong to the model are ignored."""
    if (folder / _WEIGHTS).is_file():
        with safe_open(folder / _WEIGHTS, framework="pt") as stored:
            return dict.fromkeys(stored.keys(), folder / _WEIGHTS)
    return {name: folder / file for name, file in read_index(folder / _INDEX).items()}


@contextmanager
def reading_weights(folder: Path) -> Iterator[None]:
    """Turn errors of reading a model's files into a `UserError` that names the folder."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"The weights in {folder} cannot be read: {reason(error)}") from error


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over everything that determines a tokenizer's tokens: vocabulary, rules and chat template."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    rules = _rules(backend) if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(f"{rules}|{tokenizer.chat_template}".encode()).hexdigest()


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The special tokens that are written into texts, by name: at their ends, and by chat templates."""
    return {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"}


def _rules(backend: Any) -> str:
    """A fast tokenizer as JSON, without how it padded and truncated when it was last called."""
    truncation, padding = backend.truncation, backend.padding
    backend.no_truncation()
    backend.no_padding()
    try:
        rules: str = backend.to_str()
    finally:
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)
    return rules
