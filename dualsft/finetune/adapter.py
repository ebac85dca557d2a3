"""Adapters of PEFT, trained as a fit trains chosen weights, so that the two can be compared.

An adapter adds few weights of its own to a model whose weights stay. Once trained it is merged: the result is an
ordinary checkpoint of the base model's architecture.
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch

from dualsft.errors import UserError, first_line
from dualsft.models import PreTrainedModel
from dualsft.models.loading import empty_model

_RANK, _SEED = "r", "random_seed"


@dataclass(frozen=True)
class Adapter:
    """An adapter that is still to be put on a model.

    Args:
        config: Its configuration, as PEFT's ``adapter_config.json`` has it; see `with_rank`.
        seed: Decides how it starts.
    """

    config: Mapping[str, Any]
    seed: int

    def put_on(self, model: PreTrainedModel) -> Any:
        """The model with a new adapter, whose weights alone can be trained.

        Raises:
            UserError: if PEFT is not installed, or refuses the configuration for this model.
        """
        with torch.random.fork_rng():  # so that it starts alike, whatever was drawn before
            torch.manual_seed(self.seed)
            return _put_on(model, self.config)


def with_rank(given: Mapping[str, Any], name_or_path: str, budget: int, seed: int) -> dict[str, Any]:
    """A configuration whose rank is the one that trains the number of weights nearest to a budget.

    The number is a + b r for every adapter with a rank r; a and b are found by putting two of them on the model without
    its weights. A rank that is given stays, and adapters without a rank have the size that they have.

    Args:
        given: A configuration, with ``peft_type`` at least; adapters are put on all linear layers unless
            ``target_modules`` says where.
        name_or_path: The base model.
        budget: How many weights are to be trained.
        seed: Decides what the adapter draws, if it draws anything, unless ``random_seed`` is given.

    Raises:
        UserError: if PEFT is not installed, or refuses the configuration for this model.
    """
    known = {field.name for field in fields(_kind(given))}
    defaults = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", _SEED: seed}
    config = {key: value for key, value in defaults.items() if key in known} | dict(given)
    if _RANK in known and _RANK not in given:
        one, two = (_size({**config, _RANK: rank}, name_or_path) for rank in (1, 2))
        config[_RANK] = max(1, 1 + round((budget - one) / (two - one)))
    _size(config, name_or_path)  # some refuse a rank that is too large
    return config


def check_installed() -> None:
    """Refuse to go on without PEFT."""
    if find_spec("peft") is None:
        raise UserError("an adapter needs PEFT, which is not installed; install it with pip install 'dualsft[peft]'.")


def _kind(config: Mapping[str, Any]) -> Any:
    """The class of a configuration."""
    check_installed()
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    known = {kind.value: found for kind in PeftType if (found := PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)) is not None}
    if (name := str(config.get("peft_type"))) not in known:
        raise UserError(f"peft_type is {name}; give one of {', '.join(sorted(known))}.")
    return known[name]


def _size(config: Mapping[str, Any], name_or_path: str) -> int:
    """How many weights an adapter trains, whatever it draws."""
    drawn_alike = {key: value for key, value in config.items() if key != _SEED}
    return _size_of(json.dumps(drawn_alike, sort_keys=True), name_or_path)


@lru_cache
def _size_of(drawn_alike: str, name_or_path: str) -> int:
    config, model = json.loads(drawn_alike), empty_model(name_or_path)
    try:
        adapted = _put_on(model, config)
    except NotImplementedError:  # some draw positions, which the meta device does not have
        adapted = _put_on(empty_model(name_or_path).to_empty(device="cpu"), config)
    return sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)


def _put_on(model: PreTrainedModel, config: Mapping[str, Any]) -> Any:
    kind = _kind(config)
    from peft import get_peft_model
    from peft.tuners.tuners_utils import BaseTuner

    options = {key: value for key, value in config.items() if key != "peft_type"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's calls of transformers, and its advice on kernels
            adapted = get_peft_model(model, kind(**options))
    except NotImplementedError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise UserError(f"PEFT refuses this {config['peft_type']} adapter: {first_line(error)}") from error
    if not isinstance(adapted.base_model, BaseTuner):
        raise UserError(f"{config['peft_type']} cannot be merged into a model; give another peft_type, such as LORA.")
    return adapted
