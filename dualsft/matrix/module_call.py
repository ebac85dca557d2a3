"""A module's output as a function of weights of its own, and how that changes with them."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from dualsft.errors import is_out_of_memory


class ModuleCall:
    """f(w): a leaf of a module's output at the arguments of one call.

    Args:
        module: The module.
        args: The arguments of the call.
        kwargs: Those by name.
        k: The leaf's number.
    """

    def __init__(self, module: nn.Module, args: Any, kwargs: Any, k: int) -> None:
        self._module, self._args, self._kwargs, self._k = module, args, kwargs, k
        self._alone = nn.Module()  # without the module's hooks: they have run on the inputs, and may change its weights
        self._alone.module, self._alone.forward = module, module.forward

    @torch.no_grad()
    def output(self, w: Mapping[str, Tensor]) -> Tensor:
        """f(w); other weights are the module's own."""
        return self._output({name: of.to(self._module.get_parameter(name).dtype) for name, of in w.items()})

    def derivative(self, u: Mapping[str, Tensor]) -> Tensor:
        """(∂f/∂w)u at the module's own weights, by forward-mode differentiation."""
        own = {name: self._module.get_parameter(name).detach() for name in u}
        tangents = {name: u[name].to(parameter.dtype) for name, parameter in own.items()}
        if isinstance(self._module, nn.Embedding) and self._module.padding_idx is not None:
            # a subclass; here too autograd gives the padding row no gradient
            tangents["weight"] = tangents["weight"].clone()
            tangents["weight"][self._module.padding_idx] = 0
        # fused attention has no forward-mode derivative
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            return jvp(self._output, (own,), (tangents,))[1]

    def is_linear(self, names: Collection[str]) -> bool | None:
        """Whether f is linear in the weights of these names: f(u) = (∂f/∂w)u for a random u.

        None if that cannot be told, as of an output that depends on no weight. Where tensors have no values, as their
        sizes are traced, it is taken to be in vectors, which norms have.
        """
        if isinstance(self._module, nn.Embedding):  # whose padding row has no derivative
            return False
        generator = torch.Generator().manual_seed(0)
        own = {name: self._module.get_parameter(name) for name in names}
        u = {name: torch.randn(of.shape, generator=generator).to(of.detach()) for name, of in own.items()}
        derivative = self.derivative(u)
        if derivative.is_meta or isinstance(derivative, FakeTensor):
            return all(of.dim() <= 1 for of in own.values())
        try:
            apart, size = (torch.linalg.vector_norm(of.double()) for of in (self.output(u) - derivative, derivative))
            near = torch.finfo(derivative.dtype).eps ** 0.5
            return bool(apart <= near * size) if size > 0 else None
        except Exception as error:  # of the module's own code, at weights that it was not made for
            if is_out_of_memory(error):
                raise
            return None

    def scales(self, names: Collection[str]) -> bool:
        """Whether f is w ⊙ n, for the only weight of these names and along its last axis: (∂f/∂w)u = f(w) ⊙ u / w.

        It is tried with a random u. A weight with a zero does not tell n, nor one so small that n is rounded away.
        Where tensors have no values, as their sizes are traced, a vector is taken to scale.
        """
        (w, *others) = (self._module.get_parameter(name).detach() for name in names)
        if others or w.dim() != 1 or isinstance(self._module, nn.Embedding):
            return False
        try:
            y = self.output({})
            if y.is_meta or isinstance(y, FakeTensor):
                return y.shape[-1:] == w.shape
            if y.shape[-1:] != w.shape or bool((w.abs() < torch.finfo(w.dtype).tiny ** 0.5).any()):
                return False
            u = torch.randn(w.shape, generator=torch.Generator().manual_seed(0)).to(w)
            found, expected = self.derivative(dict.fromkeys(names, u)).double(), y.double() * (u.double() / w.double())
        except Exception as error:  # of the module's own code
            if is_out_of_memory(error):
                raise
            return False
        apart, size = (torch.linalg.vector_norm(of) for of in (found - expected, expected))
        return bool(size > 0) and bool(apart <= torch.finfo(y.dtype).eps ** 0.5 * size)  # zeros would tell nothing

    def _output(self, parameters: dict[str, Tensor]) -> Tensor:
        named = {f"module.{name}": parameter for name, parameter in parameters.items()}
        outputs = functional_call(self._alone, named, self._args, self._kwargs, tie_weights=False)
        return pytree.tree_flatten(outputs)[0][self._k]
