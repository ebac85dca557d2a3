"""The terms of V_k(θ) = mean validation loss of set k + Σ_t λ_t mean_i L_t,i(θ), as passes run over them.

Some terms compare the model with the untouched base model. A second copy of the weights is held only while the pass of
such a term runs. In a gradient's pass there is one accumulator beside the model, where scoring holds an accumulator and
a direction: there the copy adds nothing to the peak of the run, but for the teacher's probabilities of a batch's
supervised tokens. At the base model's weights the model is its own teacher.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dualsft.data.layout import Batch, Layout
from dualsft.data.module import InstructionDataModule
from dualsft.errors import UserError, advising, blaming
from dualsft.matrix.passes import Losses
from dualsft.models import PreTrainedModel
from dualsft.objectives import Objective, example_losses
from dualsft.runs.progress import say
from dualsft.selection.passes import Loader
from dualsft.sharding.shard_model import is_sharded

if TYPE_CHECKING:
    from dualsft.selection.module import SelectionModule

ADVICE = (
    "a prior term needs the base model beside the model: set model.dtype to bfloat16 and start anew (--overwrite), or "
    "set model.prior.weight to 0"
)
HESSIAN = frozenset({"hessian_vector", "hessian_vector_difference"})
"""The statistics that are products with the Hessian of V."""


@dataclass(frozen=True)
class Term:
    """One term of V: a mean loss over some examples, and its weight.

    Attributes:
        kind: Its name in the log: ``validation``, or the objective's name.
        of: The name of the validation set, if there are several; empty otherwise.
        weight: λ.
        loader: Makes the batches of the examples that the mean is over.
        examples: How many examples those are.
        losses: Opens a context for a pass, given whether the model's weights are displaced in it; it holds the function
            from a batch to the loss of each example.
    """

    kind: str
    of: str
    weight: float
    loader: Loader
    examples: int
    losses: Callable[[bool], AbstractContextManager[Losses]]

    def phase(self, what: str) -> str:
        """The name of a pass over this term."""
        return f"{self.kind} {what} of {self.of}" if self.of else f"{self.kind} {what}"


class Teacher:
    """Provides the base model during a pass.

    Args:
        model: The model at the scoring checkpoint.
        load: Loads the base model onto the host.
        untouched: Whether the scoring checkpoint is the base model.
    """

    def __init__(self, model: PreTrainedModel, load: Callable[[], PreTrainedModel], untouched: bool) -> None:
        self._model, self._load, self._untouched = model, load, untouched

    @contextmanager
    def available(self, displaced: bool = False) -> Iterator[PreTrainedModel]:
        """Provide the base model in evaluation mode: a copy, unless the model is at the base model's weights itself.

        ``displaced`` says whether the model's weights are displaced from the scoring checkpoint in this context.
        """
        if self._untouched and not displaced:
            yield self._model
            return
        with advising("at loading the base model for the prior term", ADVICE):
            copy = self._load()
            copy.eval().requires_grad_(False)
            if not is_sharded(copy):  # a sharded copy is loaded to its devices
                like = dict(_tensors(self._model))  # tensor by tensor, as a model may have several types
                for name, tensor in _tensors(copy):
                    tensor.data = tensor.data.to(like[name].device, like[name].dtype)
        yield copy


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(model.named_parameters(), model.named_buffers())


def validation_terms(data: InstructionDataModule) -> dict[str, Term]:
    """Set name -> the mean loss over its examples."""
    return {name: _validation(data, name, of.ok_ids(), "validation") for name, of in data.validation_sets.items()}


def validation_halves(data: InstructionDataModule, seed: int) -> dict[str, list[Term]]:
    """Set name -> the mean losses over two halves of its examples, drawn at random.

    Raises:
        UserError: if a set has a single example.
    """
    return {
        name: [_validation(data, name, part, f"validation half {k}") for k, part in _halves(data, name, seed).items()]
        for name in data.validation_sets
    }


def _halves(data: InstructionDataModule, name: str, seed: int) -> dict[int, list[int]]:
    ids = data.validation_sets[name].ok_ids()
    if len(ids) < 2:
        key = f"data.validation.{name}" if data.named_validation else "data.validation"
        raise UserError(f"model.stability needs halves of {key}, which has a single example; give more, or drop it.")
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed)).tolist()
    return {half: sorted(ids[k] for k in order[half - 1 :: 2]) for half in (1, 2)}


def _validation(data: InstructionDataModule, name: str, ids: list[int], kind: str) -> Term:
    of = name if data.named_validation else ""
    loader = partial(data.validation_loader, name, ids=ids)
    return Term(kind, of, 1.0, loader, len(ids), lambda _: nullcontext(example_losses))


def make_further_terms(module: "SelectionModule", data: InstructionDataModule, seed: int) -> list[Term]:
    """Make all terms but the validation loss: the prior and the user's own; those of weight 0 are left out."""
    settings = module.settings
    untouched = settings.warmup.checkpoint is None and settings.warmup.fraction == 0
    teacher = Teacher(module.model, module.load_base, untouched)
    if settings.prior.weight and untouched and not HESSIAN & set(settings.scorer.needs):
        say(
            "the prior's gradient is zero at the untouched base model, and this scorer does not see its curvature: "
            "model.prior changes nothing without a warm-up."
        )
    objectives = [settings.prior.term(), *settings.objectives]
    pool = data.train_examples.ok_ids()
    return [_term(objective, pool, data, teacher, seed) for objective in objectives if objective.weight]


def _term(objective: Objective, pool: list[int], data: InstructionDataModule, teacher: Teacher, seed: int) -> Term:
    with blaming(objective, "draw"):
        ids = [int(i) for i in objective.draw(pool, seed)]
    if not ids or len(set(ids) & set(pool)) != len(ids):
        raise UserError(
            f"{type(objective).__name__} drew {len(ids):,} examples, {len(set(ids) & set(pool)):,} different ones of "
            "the pool; it must draw one or more, and each once."
        )
    loader, losses = partial(data.pool_loader, ids), partial(_losses, objective, teacher)
    return Term(objective.name, "", objective.weight, loader, len(ids), losses)


@contextmanager
def _losses(objective: Objective, teacher: Teacher, displaced: bool) -> Iterator[Losses]:
    context = teacher.available(displaced) if objective.needs_teacher else nullcontext(None)
    with context as base:

        def losses(model: PreTrainedModel, batch: Batch, layout: Layout) -> Tensor:
            with blaming(objective, "losses"):
                found = objective.losses(model, batch, layout, base)
            _check_losses(objective, found, len(layout.spans))
            return found

        yield losses


def _check_losses(objective: Objective, found: object, examples: int) -> None:
    """Check that an objective returned one loss per example, and that the losses depend on the weights."""
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.shape != (examples,):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise UserError(
            f"{type(objective).__name__}.losses gave {shape} for {examples} examples; it must give a floating tensor "
            "of one loss for each."
        )
    if torch.is_grad_enabled() and not found.requires_grad:
        raise UserError(f"{type(objective).__name__}.losses gave losses that depend on no weight; mend it.")
