"""The change that a fine-tune made, as indices and new values."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dualsft.compact import CompactParameters
from dualsft.errors import UserError


def write_delta(path: Path, model: nn.Module, compact: CompactParameters, base_fingerprint: str) -> None:
    """Write ``<name>.index`` (int64, flat, ascending) and ``<name>.value`` (the weight's type) of every trained tensor.

    The metadata holds the base weights' hash.
    """
    weights = dict(model.named_parameters())
    tensors: dict[str, Tensor] = {}
    for k, name in enumerate(compact.names):
        flat = weights[name].detach().flatten().cpu()
        index = compact.index(k)
        index = torch.arange(len(flat)) if index is None else index.cpu().long()
        tensors[f"{name}.index"] = index
        tensors[f"{name}.value"] = flat[index]
    save_file(tensors, path, {"base_fingerprint": base_fingerprint})


@torch.no_grad()
def apply_delta(path: Path, model: nn.Module, base_fingerprint: str) -> None:
    """Set the changed weights of the base model to their new values.

    Raises:
        UserError: if the delta belongs to other base weights.
    """
    weights = dict(model.named_parameters())
    with safe_open(path, framework="pt") as stored:
        metadata = stored.metadata() or {}
        if "base_fingerprint" not in metadata:
            raise UserError(f"{path} is not a delta: its metadata name no base weights; give a delta.safetensors.")
        if metadata["base_fingerprint"] != base_fingerprint:
            raise UserError(
                f"{path} belongs to base weights {metadata['base_fingerprint'][:12]}, the model has "
                f"{base_fingerprint[:12]}; give the model that it was made from."
            )
        for name in sorted(key.removesuffix(".index") for key in stored.keys() if key.endswith(".index")):  # noqa: SIM118
            weight = weights[name]
            index, value = stored.get_tensor(f"{name}.index"), stored.get_tensor(f"{name}.value")
            weight.put_(index.to(weight.device), value.to(weight))
