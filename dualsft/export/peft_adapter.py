"""A delta as a PEFT adapter: SHiRA where a linear layer's weight changed, a module stored whole elsewhere.

SHiRA (Bhardwaj et al., "Sparse High Rank Adapters", arXiv 2406.13175; `peft.tuners.shira`) keeps for a linear layer of
m × n weights the positions and values of r (m + n) entries that are added to them, with one r for the whole adapter. So

    value = new − old, in float32;  a layer with fewer changed entries than r (m + n) is filled up with zeros

and a layer whose changed entries do not fit, because r (m + n) must be at least their number and at most m n, is stored
whole (PEFT's ``modules_to_save``), as are modules of any other kind: embeddings, norms, layers with a changed bias. r
is the one that makes the adapter smallest. Modules stored whole are exact; old + value is new up to float32 rounding.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import torch
from torch import Tensor, nn

from dualsft.errors import UserError
from dualsft.export.checkpoints import Writer, check_pair, loaded_type
from dualsft.export.delta import Delta, dtype_name, open_delta, patched
from dualsft.export.model_card import write_card
from dualsft.models.loading import empty_model, model_folder
from dualsft.models.stored import Weights, has_own_names, stored_weights
from dualsft.models.tensor_file import TensorSpec, write_tensors

_PREFIX, _VALUES, _INDICES = "base_model.model.", "shira_weight", "shira_indices"
_ENTRY_BYTES = 12  # a float32 value and two int32 coordinates


@dataclass(frozen=True)
class _Plan:
    """How each changed module is stored; a tied parameter goes by its first name.

    Attributes:
        rank: SHiRA's r.
        sparse: Linear layer stored as sparse entries -> its weight's parameter.
        whole: Every name of a parameter in the modules that are stored whole -> its first name.
        modules: The modules that are stored whole.
    """

    rank: int
    sparse: dict[str, str]
    whole: dict[str, str]
    modules: list[str]


def prepare_peft(base: str, delta: str) -> Writer:
    """A PEFT adapter for the base model (a folder or hub id) that makes the change of a delta.

    Raises:
        UserError: if either cannot be read, they do not belong together, or the delta does not fit an adapter.
    """
    change = open_delta(Path(delta))
    about = check_pair(change, base)
    stored = stored_weights(model_folder(base))
    if not has_own_names(stored):
        raise UserError(
            f"{base} stores its weights under other names than its modules have, so that no adapter can be made for "
            "it; use export apply instead."
        )
    change.check_entries(stored.specs, base)
    plan = _plan(empty_model(base), change)
    _check_types(plan, stored, change)

    def write(folder: Path) -> None:
        _write_tensors(folder / "adapter_model.safetensors", plan, stored, change)
        write_card(folder, about, adapter=True)
        settings = json.dumps(_settings(plan, base), indent=2)
        (folder / "adapter_config.json").write_text(settings, encoding="utf-8")

    return write


def _check_types(plan: _Plan, stored: Weights, change: Delta) -> None:
    """Refuse values of another type than the weights among which they are stored."""
    loaded = loaded_type(change)
    for name in sorted(set(plan.whole.values()) & change.counts.keys()):
        due = dtype_name(stored.specs[name].dtype) if loaded == "auto" else loaded
        if (found := dtype_name(change.value_types[name])) != due:
            raise UserError(
                f"{change.path} is damaged: it holds {name} as {found}, and was made from a base loaded in {due}."
            )


def _plan(model: nn.Module, change: Delta) -> _Plan:
    """Decide how each changed module is stored; the model may be without its weights.

    Raises:
        UserError: if not a single layer's change fits SHiRA, or a module that is to be stored whole has a buffer.
    """
    names = _parameter_names(model)
    changed: dict[str, set[str]] = defaultdict(set)  # module -> its changed parameters, by their names in the module
    for name, first in names.items():
        if first in change.counts:
            module, _, leaf = name.rpartition(".")
            changed[module].add(leaf)
    linear = {
        module: names[f"{module}.weight"]
        for module, leaves in changed.items()
        if leaves == {"weight"} and isinstance(model.get_submodule(module), nn.Linear)
    }
    shapes = {module: model.get_parameter(f"{module}.weight").shape for module in linear}
    rank, sparse = _cheapest({m: (change.counts[linear[m]], shapes[m]) for m in linear}, change)
    if not rank:
        raise UserError(f"No linear layer's change in {change.path} is sparse enough for SHiRA; use export apply.")
    dense = changed.keys() - sparse
    modules = sorted(module for module in dense if not _is_inside(module, dense))
    sparse = {m for m in sparse if not _is_inside(m, modules)}
    _check_no_buffers(model, modules)
    whole = {name: first for name, first in names.items() if _is_inside(name, modules)}
    return _Plan(rank, {m: linear[m] for m in sorted(sparse)}, whole, modules)


def _parameter_names(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter -> its first name; a tied one has a name in each module that uses it."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return {name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}


def _check_no_buffers(model: nn.Module, modules: Iterable[str]) -> None:
    for module in modules:
        own = model.get_submodule(module)
        if buffers := sorted(own.state_dict().keys() - dict(own.named_parameters(remove_duplicate=False)).keys()):
            raise UserError(f"{module} has a buffer ({buffers[0]}), so that PEFT cannot store it; use export apply.")


def _cheapest(layers: Mapping[str, tuple[int, torch.Size]], change: Delta) -> tuple[int, set[str]]:
    """Find the r of the smallest adapter, and the layers that are sparse with it; 0 if none can be.

    Args:
        layers: Linear layer -> how many entries change, and its shape.
        change: Its values have the type in which a layer would be stored whole.
    """
    needed = {name: ceil(count / sum(shape)) for name, (count, shape) in layers.items()}
    item = max((dtype.itemsize for dtype in change.value_types.values()), default=0)
    best: tuple[float, int, set[str]] = (float("inf"), 0, set())
    for rank in sorted(set(needed.values())):
        size, sparse = 0, set()
        for name, (_, shape) in layers.items():
            entries, dense = rank * sum(shape), shape.numel() * item
            fits = needed[name] <= rank and entries <= shape.numel() and entries * _ENTRY_BYTES < dense
            size += entries * _ENTRY_BYTES if fits else dense
            if fits:
                sparse.add(name)
        if sparse:
            best = min(best, (size, rank, sparse), key=lambda found: found[:2])
    return best[1], best[2]


def _is_inside(name: str, modules: Iterable[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _write_tensors(path: Path, plan: _Plan, stored: Weights, change: Delta) -> None:
    wanted = loaded_type(change)
    convert = getattr(torch, wanted) if wanted != "auto" else None
    specs: dict[str, TensorSpec] = {}
    for name, parameter in plan.whole.items():
        spec = stored.specs[parameter]
        specs[_PREFIX + name] = TensorSpec(convert or spec.dtype, spec.shape)
    for module, parameter in plan.sparse.items():
        entries = plan.rank * sum(stored.specs[parameter].shape)
        specs[f"{_PREFIX}{module}.{_VALUES}"] = TensorSpec(torch.float32, (entries,))
        specs[f"{_PREFIX}{module}.{_INDICES}"] = TensorSpec(torch.int32, (2, entries))

    def read(name: str) -> Tensor:
        module, _, leaf = name.removeprefix(_PREFIX).rpartition(".")
        if leaf in (_VALUES, _INDICES):
            weight = stored.read(plan.sparse[module])
            places, values = _entries(weight.to(convert or weight.dtype), change, plan.sparse[module], plan.rank)
            return values if leaf == _VALUES else places
        parameter = plan.whole[name.removeprefix(_PREFIX)]
        weight = stored.read(parameter).to(specs[name].dtype)
        return patched(weight, change.change(parameter)) if parameter in change.counts else weight

    write_tensors(path, specs, read, {"format": "pt"})


def _entries(weight: Tensor, change: Delta, name: str, rank: int) -> tuple[Tensor, Tensor]:
    """Coordinates (2, entries) and values (entries) of a weight's differences, filled up with zeros elsewhere."""
    index, new = change.change(name)
    chosen = torch.zeros(weight.numel(), dtype=torch.bool)
    chosen[index] = True
    chosen[(~chosen).nonzero().squeeze(1)[: rank * sum(weight.shape) - len(index)]] = True
    added = torch.zeros(weight.numel(), dtype=torch.float32)
    added[index] = (new.double() - weight.flatten()[index].double()).float()
    flat = chosen.nonzero().squeeze(1)
    return torch.stack([flat // weight.shape[1], flat % weight.shape[1]]).int(), added[flat]


def _settings(plan: _Plan, base: str) -> dict[str, object]:
    """PEFT's ``adapter_config.json``; a mask type that it does not know keeps it from drawing masks at random."""
    return {
        "peft_type": "SHIRA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": plan.rank,
        "mask_type": "dualsft",
        "target_modules": list(plan.sparse),
        "modules_to_save": plan.modules or None,
    }
