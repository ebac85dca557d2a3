"""The interaction matrix, on one page.

    M_ij = g_ij u_j,     g_i = ∇ l_i(θ),     u = a direction in weight space, chosen by a scorer

    data utility           φ_i = Σ_j M_ij = <u, g_i>          row sums:     `RowSums`
    parameter importance   φ_j = Σ_i M_ij = u_j Σ_i g_ij      column sums:  `ColumnSums`
    Σ_i φ_i = Σ_j φ_j                                         the sum identity, an end-to-end check of both

Source: Chen, Yang, Wu, "One Algorithm, Two Goals: Dual Scoring for Parameter and Data Selection in LLM Fine-Tuning",
arXiv 2605.06166. M has (examples x weights) entries and is never formed; neither is any g_i. Both sums come from one
ordinary backward pass over a batch of examples:

*Rows.* Let f be a module whose own forward uses parameters w, y = f(w, a) its output and e = ∂(Σ_i l_i)/∂y the gradient
of that output. The module's share of <u, g_i> is the local Jacobian-vector product (∂f/∂w) u_w dotted with e, over the
outputs that belong to example i. Summed over all modules this is exact, and a tied weight counts once per use, as it
must. For Linear the product is a Uᵀ, so it is for each expert of a mixture, for Embedding it is U[id], and for anything
else `torch.func.jvp` of the module's own forward.

*Columns.* The weight gradients of Σ_i l_i are Σ_i g_i already. Each is added to a float32 sum and dropped as soon as it
is complete, so that one layer's dense gradient exists at a time.

Read on in this order: `rows.py` (where the rows add up), `tap.py` (a module's share of them), `linear_tap.py` and
`experts_tap.py` (the same for Linear and for experts, sooner), `placement.py` (which module uses which weight),
`passes.py` (a pass over many batches).
"""

import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dualsft.errors import UserError
from dualsft.matrix.experts_tap import ExpertsTap
from dualsft.matrix.host_sums import HostSums
from dualsft.matrix.linear_tap import LinearTap
from dualsft.matrix.placement import Placement, find_placement
from dualsft.matrix.rows import Rows
from dualsft.matrix.tap import GeneralTap, Tap
from dualsft.models.dtypes import accumulator_dtype
from dualsft.models.experts import EXPERT_WEIGHTS, is_grouped
from dualsft.models.linear import is_linear
from dualsft.sharding.collectives import any_rank
from dualsft.sharding.shard_model import is_sharded
from dualsft.sharding.shards import compute_device, local_shard
from dualsft.sharding.unit_gather import unsharded_parameters

Direction = Mapping[str, Tensor]
"""Parameter name -> u, of the parameter's shape."""


class ColumnSums:
    """Σ_i g_i of every trainable parameter, added up over all backward passes while the context is open.

    Args:
        model: Any module.
        squared: Whether to sum the squares of the entries instead; a backward pass must then be one example's.
        on_host: Whether the sums are held on the host, whatever device the gradients are on.

    Attributes:
        sums: Parameter name -> sum of gradients, of the parameter's shape, in float32 (float64 for float64 weights); on
            the host they hold all gradients after `complete`.
    """

    def __init__(self, model: nn.Module, squared: bool = False, on_host: bool = False) -> None:
        self.squared = squared
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._unsharded = unsharded_parameters(model) if squared and is_sharded(model) else {}
        shards = {n: local_shard(p.detach()) for n, p in self._parameters.items()}
        self.sums = {
            n: torch.zeros(s.shape, dtype=accumulator_dtype(s), device="cpu" if on_host else s.device)
            for n, s in shards.items()
        }
        each = squared and not self._unsharded
        self._host = HostSums(self.sums, each, compute_device(model)) if on_host else None
        self._largest: list[Tensor] = []  # |entry| of each gradient on its way since the last look, on the device
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "ColumnSums":
        if self._host:
            self._host.__enter__()
        self._handles = [
            p.register_post_accumulate_grad_hook(partial(self._add, n)) for n, p in self._parameters.items()
        ]
        # gradients of a sharded model are squared before they are added up over the ranks
        self._handles += [p.register_post_accumulate_grad_hook(_square) for p in self._unsharded.values()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for parameter in self._parameters.values():  # left by a backward that an error interrupted
            parameter.grad = None
        if self._host:
            self._host.__exit__()

    def _add(self, name: str, parameter: Tensor) -> None:
        if parameter.grad is None:  # compiled code calls the hooks of weights that took no part too
            return
        gradient = local_shard(parameter.grad)
        if self._host:
            if gradient.numel():  # a shard may be empty
                self._largest.append(torch.linalg.vector_norm(gradient, math.inf))
                self._host.add(name, gradient)
        elif self.squared and not self._unsharded:
            self.sums[name].addcmul_(wide := gradient.to(self.sums[name].dtype), wide)
        else:
            self.sums[name].add_(gradient)
        parameter.grad = None

    def complete(self) -> None:
        """Wait until the sums hold all gradients, those on their way to the host too."""
        if self._host:
            self._host.complete()

    def finite(self) -> Bool[Tensor, ""]:
        """Whether all is finite that was added since the last look at least; does not wait for the device."""
        largest, self._largest = self._largest, []
        if not self._host:  # all sums at once, as a look at each gradient would be a launch for each
            sums = [total for total in self.sums.values() if total.numel()]
            largest = [*torch._foreach_norm(sums, math.inf)] if sums else []
        return torch.stack(largest).isfinite().all() if largest else torch.tensor(True)

    def check(self) -> None:
        """Check sums on the host, of which no look at the gradients shows whether they overflow; all ranks call this.

        Raises:
            UserError: if one is not finite.
        """
        if not self._host:
            return
        sums = [total for total in self.sums.values() if total.numel()]
        finite = all(bool(largest.isfinite()) for largest in torch._foreach_norm(sums, math.inf))
        if any_rank(not finite):
            what = "squares of gradients" if self.squared else "gradients"
            dtype = next(iter(self.sums.values())).dtype  # a rank may have empty shards alone
            raise UserError(f"The {what} overflow {dtype} when added, though each gradient is finite.")

    def reset(self) -> None:
        """Start again from zero."""
        self.complete()
        for total in self.sums.values():
            total.zero_()


def _square(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.square_()


class RowSums:
    """Taps on a model's modules, which add <u, g_i> of every example of a batch to a `Rows` while the context is open.

    Use: ``with RowSums(model, [u]) as rows: rows.begin(layout); losses(batch).sum().backward(); phi = rows.read()[0]``.

    Args:
        model: Any module; its first forward pass shows which modules are to be tapped.
        directions: One u or more, each for every parameter that is scored.
        by_token: Whether to keep contributions by token too.
    """

    def __init__(self, model: nn.Module, directions: Sequence[Direction], by_token: bool = False) -> None:
        self._model = model
        self.rows = Rows(directions, by_token, compute_device(model))
        both = (*model.named_parameters(), *unsharded_parameters(model).items())
        self._names = {id(p): name for name, p in both if name in directions[0]}
        self._taps: list[Tap] | None = None  # once the first forward pass has shown where they are to be
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Rows:
        self._handles = [self._model.register_forward_pre_hook(self._before_forward, with_kwargs=True, prepend=True)]
        self._handles += [tap.register() for tap in self._taps or []]
        return self.rows

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find which module uses which parameter, if it is not known yet, by another forward pass of the same input."""
        if self._taps is None and torch.is_grad_enabled():
            self._taps = []  # not None, as that pass calls this hook too
            try:
                self._taps = self._made(find_placement(model, self._names, self.rows.check_output, args, kwargs))
            except BaseException:
                self._taps = None
                raise
            self._handles += [tap.register() for tap in self._taps]

    def _made(self, placement: Placement) -> list[Tap]:
        paths = {module: path for path, module in self._model.named_modules()}
        taps = []
        for module, scored in placement.items():
            own = module.named_parameters(remove_duplicate=False)
            names = {n: self._names[id(p)] for n, p in own if self._names.get(id(p)) in scored}
            taps.append(_kind(module, names)(self.rows, f"{paths[module]} ({type(module).__name__})", module, names))
        return taps


def _kind(module: nn.Module, names: Collection[str]) -> type[Tap]:
    """The tap that suits a module of which the parameters of these names, its own for them, are scored."""
    if is_linear(module) and "weight" in names:
        return LinearTap
    return ExpertsTap if is_grouped(module) and EXPERT_WEIGHTS.issuperset(names) else GeneralTap
