"""What is known of a model without its weights: its configuration, and tensors that have shapes alone."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoModelForCausalLM, PretrainedConfig

from dualsft.errors import UserError, first_line
from dualsft.models import PreTrainedModel
from dualsft.models.dtypes import accumulator_dtype, direction_dtype, settled_dtype, stored_dtype
from dualsft.models.experts import group_experts
from dualsft.models.inspection import check_files, explaining_load, read_config
from dualsft.models.loading import Dtype
from dualsft.objectives.tail import trust_tail
from dualsft.sharding.shard_model import transformer_blocks
from dualsft.storage.hub import OFFLINE, cache_alone_when_offline
from dualsft.storage.paths import expanded


@dataclass(frozen=True)
class Weight:
    """One parameter: how many entries it has along its first axis and along all others, and the bytes of an entry.

    Attributes:
        wide: Bytes of an entry of its sums of gradients.
        directed: Bytes of an entry of its directions.
        block: The number of the transformer block that it belongs to; None outside the blocks.
    """

    name: str
    rows: int
    width: int
    itemsize: int
    wide: int
    directed: int
    block: int | None

    @property
    def size(self) -> int:
        """How many entries it has."""
        return self.rows * self.width

    def share(self, ranks: int) -> int:
        """How many entries the largest shard has: of its rows, rounded up."""
        return -(-self.rows // ranks) * self.width


class ModelShape:
    """A causal language model by its configuration alone.

    Args:
        folder: Holds ``config.json``.
        dtype: Type that the weights are held in; ``auto`` is the configuration's, or `settled_dtype` on a CPU.
        cpu: Whether a CPU computes in that type.

    Attributes:
        weights: All parameters, tied ones once.
        layers: How many transformer blocks it has.
        traced: What has been found out of batches.
    """

    def __init__(self, folder: Path, dtype: Dtype, cpu: bool = False) -> None:
        check_files(folder)
        self.folder, self._config = folder, read_config(folder)
        held = settled_dtype(self._config, dtype, cpu)
        self.dtype: torch.dtype = stored_dtype(self._config) if held == "auto" else getattr(torch, held)
        model = self.model(torch.device("meta"))
        self.weights = list(_weights(model))
        self.layers = len(transformer_blocks(model))
        self.traced: dict[Any, Any] = {}

    @property
    def count(self) -> int:
        """How many weights the model has."""
        return sum(weight.size for weight in self.weights)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def vocabulary(self) -> int:
        """How many token ids have a logit."""
        return int(self._config.get_text_config().vocab_size)

    @property
    def positions(self) -> int | None:
        """The longest example that the model is made for, where the configuration says so."""
        return getattr(self._config.get_text_config(), "max_position_embeddings", None)

    def model(self, device: torch.device, layers: int | None = None) -> PreTrainedModel:
        """The model without its weights' values, with fewer blocks if asked for."""
        config = self._config if layers is None else _shortened(self._config, layers)
        with explaining_load(self.folder), device:
            made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=self.dtype)
        group_experts(made)  # transformers' own products have no shapes in every type
        trust_tail(made)
        return made.eval()


def _shortened(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The configuration of the same model with fewer blocks; lists with an entry for each block are cut."""
    short = deepcopy(config)
    text: Any = short.get_text_config()
    full = text.num_hidden_layers
    for key, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == full:
            setattr(text, key, value[:layers])
    text.num_hidden_layers = layers
    return short


def _weights(model: PreTrainedModel) -> Iterator[Weight]:
    blocks = {id(p): k for k, block in enumerate(transformer_blocks(model)) for p in block.parameters()}
    for name, p in model.named_parameters():
        rows = p.shape[0] if p.dim() else 1
        wide, directed = accumulator_dtype(p).itemsize, direction_dtype(p).itemsize
        yield Weight(name, rows, p.numel() // max(rows, 1), p.itemsize, wide, directed, blocks.get(id(p)))


def find_config(name_or_path: str) -> Path:
    """The folder with a model's configuration: the given one, or the hub's, of which nothing else is fetched.

    Raises:
        UserError: if there is none.
    """
    folder = Path(expanded(name_or_path))
    if folder.is_dir():
        return folder
    if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
        raise UserError(f"{name_or_path}: no such folder; give one that holds a config.json, or a hub id.")
    with cache_alone_when_offline() as offline:
        try:
            return Path(hf_hub_download(name_or_path, "config.json")).parent
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            why = OFFLINE if offline else first_line(error)
            raise UserError(
                f"{name_or_path} is neither a folder nor a model whose config.json the hub gives us ({why}); give a "
                "folder that holds a config.json."
            ) from error


def named_shape(name_or_path: str, dtype: Dtype, cpu: bool = False) -> ModelShape:
    """The shape of a model given by folder or hub id; raises as `find_config` and `ModelShape` do."""
    return ModelShape(find_config(name_or_path), dtype, cpu)
