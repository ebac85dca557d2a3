"""The job that a configuration of select or of fit describes, without its data, its weights or its trainer made."""

import os
from collections.abc import Mapping, Sequence
from pkgutil import resolve_name
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.strategies import StrategyRegistry

from dualsft.allocators.structured import Structured
from dualsft.commands.keys import knows
from dualsft.commands.messages import explaining_settings, quieten
from dualsft.commands.parsing import CONFIG, check_numbers, parser_of, prepare
from dualsft.commands.path_options import expand_paths
from dualsft.data.options import validation_sources
from dualsft.errors import UserError
from dualsft.models.dtypes import FULL_PRECISION
from dualsft.plans.job import DataSizes, FitJob, Job, Machine, SelectJob, Step, Trained
from dualsft.plans.passes import Running
from dualsft.plans.shape import named_shape
from dualsft.selection import load_selection
from dualsft.selection.settings import SelectionSettings
from dualsft.sharding.strategy import DDP, FSDP2, RANKS, checked_shard_size

_HALF = ("bf16", "bf16-mixed")
_PROBE = 1024
"""Entries of the vector on which an optimizer takes a step, to see what it keeps for each."""


def make_job(
    verb: str,
    arguments: Sequence[str],
    supervised: float,
    pool: float | None,
    validation: float | None,
    to_be_chosen: bool = True,
    memory: int | None = None,
) -> Job:
    """The job of a verb's arguments.

    Args:
        verb: select or fit.
        arguments: Configurations and options of both.
        supervised: Share of the tokens that are supervised.
        pool: Tokens of the pool, if known.
        validation: Tokens of the validation sets, if known.
        to_be_chosen: Whether a fit without a finished selection trains what the configuration would have `select`
            choose, and not all weights.
        memory: Bytes of a device, if known.

    Raises:
        UserError: on a mistake in the settings, or a model without a usable configuration.
        ArgumentError: on options that cannot be parsed.
    """
    quieten()
    config = parsed(verb, known_to(verb, arguments))
    model, data, trainer = config.model, config.data, config.trainer
    cpu = _device(trainer) == "cpu" and trainer.precision in FULL_PRECISION
    shape = named_shape(model.model_name_or_path, model.dtype, cpu)
    running = Running(model.gradient_checkpointing, trainer.precision in _HALF)
    longest = min(data.max_length, shape.positions or data.max_length)
    sets = max(1, len(validation_sources(data.validation)))
    sizes = DataSizes(data.batch_tokens, longest, data.batch_size, supervised, pool, validation, sets)
    common: dict[str, Any] = {"shape": shape, "machine": _machine(trainer, memory), "data": sizes, "running": running}
    if verb == "select":
        return SelectJob(**common, settings=_settings(config))
    chooses = to_be_chosen and any(a in CONFIG for a in arguments)
    choice = parsed("select", known_to("select", arguments)) if chooses else None
    share, structured, data_share = _chosen(model.selection, choice, shape.count)
    accumulated = trainer.accumulate_grad_batches or 1
    prior = bool(model.training_prior.weight)
    trained = Trained(share, structured, *_optimizer(config, _device(trainer)), accumulated, prior)
    epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else 1
    batches = trainer.max_steps * accumulated if trainer.max_steps > 0 else None
    return FitJob(**common, trained=trained, epochs=epochs, data_share=data_share, batches=batches)


def known_to(verb: str, arguments: Sequence[str]) -> list[str]:
    """The arguments without options that the other verb alone knows."""
    own, other = parser_of(verb), parser_of("fit" if verb == "select" else "select")
    kept: list[str] = []
    takes = True
    for argument in arguments:
        if argument.startswith("--"):
            key = argument.removeprefix("--").partition("=")[0]
            takes = argument in CONFIG or knows(own, key) or not knows(other, key)
        if takes:
            kept.append(argument)
    return kept


def parsed(verb: str, arguments: Sequence[str]) -> Namespace:
    """The configuration of a verb, of options that it knows."""
    parser = parser_of(verb)
    config = expand_paths(parser.parse_args(prepare(arguments, verb, parser)))
    check_numbers(config)
    return config


def _settings(config: Namespace) -> SelectionSettings:
    """The options of a selection, with its scorer and allocators made."""
    parser: ArgumentParser = parser_of("select")
    with explaining_settings():
        made = parser.instantiate_classes(config)
    settings: SelectionSettings = made.model.settings
    return settings


def _device(trainer: Namespace) -> str:
    return "cpu" if trainer.accelerator == "cpu" else "cuda"


def _machine(trainer: Namespace, memory: int | None) -> Machine:
    """The machine that a trainer's settings ask for; that the accelerator is not there does not matter."""
    devices, strategy = trainer.devices, trainer.strategy
    count = len(devices) if isinstance(devices, list) else devices
    if isinstance(count, str):
        count = int(count) if count.isdecimal() else count
    if not isinstance(count, int) or count < 1:
        raise UserError(f"trainer.devices is {devices!r}; a plan needs their number, such as --trainer.devices 8.")
    ranks = count * int(trainer.num_nodes)
    kind, options = _strategy(strategy)
    if ranks > 1 and kind is None:
        raise UserError(
            f"The trainer has {ranks} devices and the strategy {getattr(strategy, 'class_path', strategy)!r}; set "
            "trainer.strategy to ddp, under which each holds all weights, to fsdp2, which shards them, or to hsdp."
        )
    size = 1 if kind is not FSDP2 else checked_shard_size(options.get("shard_size"), count, ranks)
    offload = bool(options.get("cpu_offload"))
    return Machine(_device(trainer), ranks, offload, memory, ranks // size, int(trainer.num_nodes))


def _strategy(strategy: str | Namespace) -> tuple[type | None, Mapping[str, Any]]:
    """Which of our strategies is asked for, and its options; None for any other."""
    if isinstance(strategy, str):
        if strategy not in StrategyRegistry:
            return None, {}
        registered = StrategyRegistry[strategy]  # its `get` makes one
        kind = DDP if strategy == "ddp" else registered["strategy"]
        return kind if kind in RANKS else None, registered["init_params"]
    with explaining_settings():
        given = resolve_name(strategy.class_path)
    kind = next((kind for kind in RANKS if isinstance(given, type) and issubclass(given, kind)), None)
    return kind, strategy.get("init_args") or {}


def _chosen(selection: str | None, choice: Namespace | None, count: int) -> tuple[float, bool, float]:
    """The share of the weights that a fit trains, whether they are whole units, and the share of the pool.

    A selection that is there tells; otherwise what the same configuration asks `select` for.
    """
    if selection and os.path.isdir(selection):
        about = load_selection(selection).about
        weights, examples = about.counts.parameters, about.counts.examples
        structured = _is_structured(about.settings["parameter_allocator"].class_path)
        return weights.selected / weights.scored, structured, examples.selected / max(1, examples.scored)
    if selection is None and choice is None:
        return 1.0, False, 1.0
    if choice is None:
        raise UserError(f"{selection}: no such selection; give one, or a configuration with model.parameter_budget.")
    budget, data = choice.model.parameter_budget, choice.model.data_budget
    structured = _is_structured(getattr(choice.model.parameter_allocator, "class_path", ""))
    return _share(budget, count), structured, data if isinstance(data, float) else 1.0


def _is_structured(allocator: str) -> bool:
    """Whether an allocator takes whole rows; one whose package is gone is taken not to."""
    try:
        return bool(allocator) and issubclass(resolve_name(allocator), Structured)
    except (ImportError, AttributeError):
        return False


def _share(budget: int | float | None, count: int) -> float:
    return 1.0 if budget is None else budget if isinstance(budget, float) else min(1.0, budget / count)


def _optimizer(config: Namespace, device: str) -> tuple[float, Step]:
    """Bytes that the optimizer keeps for a trained weight, seen on a few; and how its step works on the tensors."""
    given = config.get("optimizer")
    path, options = ("torch.optim.AdamW", {}) if given is None else (given.class_path, dict(given.get("init_args", {})))
    few = torch.nn.Parameter(torch.zeros(_PROBE))
    with explaining_settings():
        optimizer = resolve_name(path)([few], **options)
    few.grad = torch.ones_like(few)
    optimizer.step(lambda: torch.zeros(()))
    kept = [t for t in optimizer.state[few].values() if isinstance(t, torch.Tensor) and t.numel() == _PROBE]
    step: Step = "single" if device == "cpu" or optimizer.defaults.get("foreach") is False else "foreach"
    return sum(t.nbytes for t in kept) / _PROBE, "fused" if optimizer.defaults.get("fused") else step
