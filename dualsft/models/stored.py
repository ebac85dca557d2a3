"""A checkpoint's weights by the names of the model's parameters, read from the files one at a time if possible.

It is possible if the files name the parameters as the model does. If the library renames or fuses weights on loading
(mixtures of experts, checkpoints without the model's prefix), or a tied weight is stored twice, the model is loaded.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn

from dualsft.errors import UserError
from dualsft.models.loading import Dtype, empty_model, load_model, model_folder, reading_weights, weight_files
from dualsft.models.tensor_file import DTYPES, TensorSpec


@dataclass(frozen=True)
class Weights:
    """The tensors of a model folder, from its files or from a loaded model.

    Attributes:
        folder: The model folder.
        specs: Name -> type and shape.
        read: Returns the tensor of a name, which must not be modified.
        files: Name -> the file of the tensor; None if the model is loaded.
    """

    folder: Path
    specs: Mapping[str, TensorSpec]
    read: Callable[[str], Tensor]
    files: Mapping[str, Path] | None = None


def stored_weights(folder: Path) -> Weights:
    """The tensors of a model's files, under the names in the files; they must be of a type that is known here."""
    with reading_weights(folder):
        files = weight_files(folder)
        specs = {name: _spec(name, path) for name, path in files.items()}

    def read(name: str) -> Tensor:
        with reading_weights(folder), safe_open(files[name], framework="pt") as stored:
            return stored.get_tensor(name)

    return Weights(folder, specs, read, files)


def stored_rows(stored: Weights, name: str, rows: slice) -> Tensor:
    """Rows (of dimension 0) of a stored tensor; no others are read."""
    assert stored.files is not None
    with reading_weights(stored.folder), safe_open(stored.files[name], framework="pt") as file:
        part: Tensor = file.get_slice(name)[rows]
    return part


def _spec(name: str, path: Path) -> TensorSpec:
    with safe_open(path, framework="pt") as stored:
        tensor = stored.get_slice(name)
        dtype, shape = tensor.get_dtype(), tuple(tensor.get_shape())
    if dtype not in DTYPES:
        raise UserError(f"{path} stores {name} as {dtype}, which is not known here; give a checkpoint of plain floats.")
    return TensorSpec(DTYPES[dtype], shape)


def loaded_weights(name_or_path: str, dtype: Dtype = "auto") -> Weights:
    """The parameters of a model, which is loaded by `load_model`."""
    return weights_of(model_folder(name_or_path), load_model(name_or_path, dtype))


def weights_of(folder: Path, model: nn.Module) -> Weights:
    """The parameters of a loaded model, and the folder that it comes from."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    specs = {name: TensorSpec.of(weight) for name, weight in parameters.items()}
    return Weights(folder, specs, parameters.__getitem__)


def parameter_weights(name_or_path: str, dtype: Dtype = "auto") -> Weights:
    """The weights by parameter name, from the files if these have the same names, otherwise of the loaded model.

    Only a model that must be loaded is cast to the type.
    """
    stored = stored_weights(model_folder(name_or_path))
    return stored if has_own_names(stored) else loaded_weights(name_or_path, dtype)


def has_own_names(stored: Weights) -> bool:
    """Whether a folder's files hold exactly the model's parameters, with the model's names and shapes, and buffers."""
    model = empty_model(str(stored.folder))
    parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = {name: spec.shape for name, spec in stored.specs.items() if name in parameters}
    others = stored.specs.keys() - parameters.keys()
    return found == parameters and others <= {name for name, _ in model.named_buffers()}
