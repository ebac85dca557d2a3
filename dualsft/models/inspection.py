"""One look at a base before anything is computed: what can be neither scored nor trained is refused, in one sentence.

`check_files` sees an adapter, quantised weights, a classifier or a masked model by the JSON files alone, `read_config`
whatever the library refuses about a configuration, and an encoder-decoder. Once the model is loaded, `check_weights`
sees tensors that are absent, of another shape or quantised, `check_causal` tokens that see those behind them, and
`check_examples` token ids and positions that have no embedding.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig, PretrainedConfig

from dualsft.errors import UserError
from dualsft.models import PreTrainedModel

_ADAPTER, _CONFIG, _GENERATION = "adapter_config.json", "config.json", "generation_config.json"
_OTHER_HEADS = re.compile(r"\w*(Classification|QuestionAnswering|MultipleChoice|SentencePrediction|RewardModel)")
_MASKED = re.compile(r"\w*MaskedLM")
_QUANTISED = re.compile(
    r"(\.|_)(qweight|qzeros|g_idx|weight_packed|weight_scale(_inv)?|weight_zero_point|SCB|absmax|quant_map|blocks"
    r"|scales|quant_state\.\w+)$"
)
"""Ends of the names of tensors that quantisers store."""
_PLACES = re.compile(r"(^|_)(wpe|pos|positions?)(_|$)")
"""Names of tables with a row for each position."""
_BIASED = {"mpt": "max_seq_len"}
"""Types of models that add a bias to attention which is as long as a setting says, and that setting."""
_SEEN = {torch.float64: 1e-6, torch.float32: 1e-4}
_SEEN_IN_HALF_PRECISION = 0.1  # experts that are chosen otherwise after rounding move logits by some hundredths
_LONGEST_REASON = 300


def check_files(folder: Path) -> None:
    """Refuse a folder that by its JSON files holds no plain weights of a causal language model.

    Raises:
        UserError: if it is an adapter, is quantised, is a model with another head, or a JSON file cannot be read.
    """
    if (folder / _ADAPTER).is_file():
        base = _json_object(folder / _ADAPTER).get("base_model_name_or_path")
        raise UserError(
            f"{folder} holds an adapter ({_ADAPTER}) for {_cut(str(base))}; merge it into that model (PEFT's "
            "merge_and_unload, then save_pretrained) and give the folder of the result."
        )
    if not (folder / _CONFIG).is_file():
        raise UserError(
            f"{folder} is not a model folder: it has no config.json; give a Hugging Face model folder or id."
        )
    config = _json_object(folder / _CONFIG)
    if method := _quantiser(config):
        raise UserError(
            f"{folder} holds weights that are quantised by {method} (quantization_config in config.json), which can "
            "be neither scored nor trained; give the model that they were quantised from."
        )
    _check_head(folder, config)


def _json_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be loaded because it is not a valid JSON file ({reason(error)}); mend it."
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"{path} cannot be loaded because it holds no JSON object; mend it.")
    return found


def _quantiser(config: Mapping[str, Any]) -> str | None:
    """The name of the method that quantised the weights, or those of a part of the model."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if settings := part.get("quantization_config") or part.get("compression_config"):
            method = settings.get("quant_method") if isinstance(settings, dict) else None
            return _cut(str(method or "an unnamed method"))
    return None


def _check_head(folder: Path, config: Mapping[str, Any]) -> None:
    architectures = config.get("architectures")
    named = architectures if isinstance(architectures, list) else []
    other = [name for name in named if isinstance(name, str) and _OTHER_HEADS.fullmatch(name)]
    if not config.get("is_decoder"):
        other += [name for name in named if isinstance(name, str) and _MASKED.fullmatch(name)]
    if other and len(other) == len(named):
        raise UserError(
            f"{folder} is not a causal language model: it is a {_cut(other[0])} by config.json; give a model that "
            "predicts the next token."
        )


def read_config(folder: Path) -> PretrainedConfig:
    """The configuration of a causal language model, as the library reads it.

    Raises:
        UserError: if the library refuses it or the generation settings, or it is that of another kind of model.
    """
    with explaining_load(folder):
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{folder} is an encoder-decoder model ({config.model_type}), not a causal language model; give a "
            "decoder-only one."
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"{folder} is not a causal language model: transformers has none for models of the type "
            f"{config.model_type!r} (of a multimodal one its language model alone may be given)."
        )
    text = config.get_text_config()
    pad, rows = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if isinstance(pad, int) and isinstance(rows, int) and pad >= rows:
        raise UserError(
            f"{folder / _CONFIG} has the pad_token_id {pad:,}, but the embedding has {rows:,} rows (vocab_size); set "
            "pad_token_id to null there, as padding needs no embedding."
        )
    _check_generation(folder)
    return config


def _check_generation(folder: Path) -> None:
    path = folder / _GENERATION
    if not path.is_file():
        return
    _json_object(path)
    try:
        GenerationConfig.from_pretrained(folder)
    except Exception as error:  # the library has a kind of exception for each mistake
        raise UserError(f"{path} cannot be used ({reason(error)}); mend or remove it.") from error


@contextmanager
def explaining_load(folder: Path) -> Iterator[None]:
    """Turn whatever the library raises while it makes a model of a folder into a `UserError` that names the folder."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except ImportError as error:
        raise UserError(
            f"{folder} cannot be loaded as a causal language model, as its config.json asks for a package that is not "
            f"installed ({reason(error)}); install it, or remove the setting (such as attn_implementation) there."
        ) from error
    except Exception as error:  # a wrong setting can raise any exception
        raise UserError(f"{folder} cannot be loaded as a causal language model: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """The first line of an exception's message, with the next one if it only announces that; cut if it is long."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    text = f"{lines[0]} {lines[1].strip()}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
    return _cut(f"{type(error).__name__} {text}" if isinstance(error, KeyError) else text)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_REASON else f"{text[: _LONGEST_REASON - 3]}..."


def check_weights(folder: Path, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Refuse a loaded model whose weights are quantised, absent from its files, or of other shapes there.

    Args:
        folder: The model's folder.
        model: The loaded model.
        info: What the library tells about loading it.
    """
    strange = [name for name in info["unexpected_keys"] if _QUANTISED.search(name)]
    strange += [name for name, weight in model.named_parameters() if not _is_plain(weight)]
    if strange:
        raise UserError(
            f"{folder} holds quantised weights ({min(strange)}), which can be neither scored nor trained; give the "
            "model that they were quantised from."
        )
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{folder} lacks {len(missing)} of the model's weights ({missing[0]}, ...); the checkpoint is incomplete."
        )
    if mismatched := sorted(info["mismatched_keys"]):
        name, stored, wanted = mismatched[0]
        raise UserError(
            f"{folder} has {name} of shape {tuple(stored)} where its config.json asks for {tuple(wanted)}; they do not "
            "belong together."
        )


def _is_plain(weight: Tensor) -> bool:
    return weight.is_floating_point() and weight.dtype.itemsize > 1


@torch.no_grad()
def check_causal(model: PreTrainedModel, device: torch.device) -> None:
    """Refuse a model whose first token sees the tokens behind it, by two rows that differ in these alone.

    Args:
        model: In evaluation mode; every rank calls this for a sharded model.
        device: Where the model computes.
    """
    rows = torch.tensor([[0, 1, 1, 2], [0, 2, 3, 3]], device=device) + _first_plain_id(model)
    logits = None
    with suppress(Exception):  # such as a kernel for another device than the one that the model is loaded on
        logits = model(input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=False).logits[:, 0].double()
    if logits is None or not bool(logits.isfinite().all()):
        return
    one, other = logits - logits.mean(1, keepdim=True)
    if float((one - other).norm()) > _SEEN.get(model.dtype, _SEEN_IN_HALF_PRECISION) * float(one.norm()):
        raise UserError(
            f"{type(model).__name__} of {model.name_or_path} is not a causal language model: its first token sees the "
            "tokens behind it (a BERT needs is_decoder: true in config.json, and training as a decoder); give a model "
            "that predicts the next token."
        )


def _first_plain_id(model: PreTrainedModel) -> int:
    """An id that, like the three behind it, stands for no image and is no padding."""
    whole = model.config.to_dict()
    parts = (whole, *(part for part in whole.values() if isinstance(part, dict)))
    special = {str(part[key]) for part in parts for key in part if str(key).endswith(("_id", "_index"))}
    candidates = (k for k in range(embedding_rows(model) - 3) if special.isdisjoint(map(str, range(k, k + 4))))
    return next(candidates, 0)


def embedding_rows(model: PreTrainedModel) -> int:
    """How many token ids have an embedding."""
    return len(model.get_input_embeddings().get_parameter("weight"))


def check_examples(model: PreTrainedModel, source: str, largest_id: int, longest: int) -> None:
    """Check that the model has an embedding for every token id and every position of some examples.

    Args:
        model: The model.
        source: The option that the examples come from.
        largest_id: The largest token id of the examples.
        longest: Tokens of the longest example.
    """
    if largest_id >= (rows := embedding_rows(model)):
        raise UserError(
            f"The data hold token id {largest_id:,}, but the model's vocabulary has {rows:,} tokens; use the "
            "model's own tokenizer."
        )
    if (places := learned_positions(model)) is not None and longest > places:
        raise UserError(
            f"{source} has an example of {longest:,} tokens, but the model has {places:,} positions; set "
            f"data.max_length to {places} or less."
        )


def learned_positions(model: PreTrainedModel) -> int | None:
    """How many tokens a model has positions for, if these are rows of a table or a bias; None for any number."""
    decoder = model.get_decoder() or model
    tables = [
        len(of.weight) - getattr(of, "offset", 0) - (0 if of.padding_idx is None else of.padding_idx + 1)
        for name, of in decoder.named_modules()
        if isinstance(of, nn.Embedding) and _PLACES.search(name.rpartition(".")[2])
    ]
    tables += [
        len(table)
        for name, table in decoder.named_buffers()
        if table.dim() == 2 and _PLACES.search(last := name.rpartition(".")[2]) and not last.endswith("ids")
    ]
    if setting := _BIASED.get(model.config.model_type):
        tables.append(getattr(model.config, setting))
    return min(tables, default=None)
