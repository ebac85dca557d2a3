"""The phases that cost time: warm-up, gradients, Hessian-vector products, scores; none is repeated after a kill."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from dualsft.data import Examples, InstructionDataModule
from dualsft.errors import UserError, advising
from dualsft.matrix.curvature import (
    HessianVectorProduct,
    check_differences,
    check_smooth,
    difference_step,
    displaced,
    twice_differentiable,
)
from dualsft.matrix.pass_result import GradientPass
from dualsft.matrix.sketches import Measurement
from dualsft.runs.folder import RunFolder
from dualsft.runs.keeping import PhaseKeeper
from dualsft.runs.progress import PhaseLog
from dualsft.selection.moments import SECOND_MOMENT, Moments
from dualsft.selection.passes import Passes
from dualsft.selection.step import StepSize
from dualsft.selection.terms import Term
from dualsft.selection.warmup import ADVICE, Warmup, warm_up
from dualsft.sharding.collectives import on_rank_zero
from dualsft.sharding.save import save_sharded, write_shards
from dualsft.sharding.shard_model import is_sharded
from dualsft.sharding.shards import local_shard

_STEP = "step-size"
Part = tuple[float, Mapping[str, Tensor]]
"""A weight, and what it weighs: a sum by parameter name."""


class Phases:
    """The phases of one selection, over one model and one output folder.

    Args:
        model: The base model, or the scoring checkpoint that stands for a warm-up.
        data: The pool and the validation set.
        run: Keeps the state of finished phases, and of the one under way.
        log: Keeps what each phase cost, and shows progress.
        seed: Decides which examples the warm-up draws, and their order.
        checkpointing: Whether to recompute activations in the backward pass.
        save_minutes: How often to keep the state of the phase under way.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        data: InstructionDataModule,
        run: RunFolder,
        log: PhaseLog,
        seed: int,
        checkpointing: bool = False,
        save_minutes: float = 10.0,
    ) -> None:
        self._model, self._data, self._run, self._log, self._seed = model, data, run, log, seed
        self._save_minutes = save_minutes
        longest = max(map(_longest, (data.train_examples, *data.validation_sets.values())))
        self._passes = Passes(model, run, log, data.batch_tokens, longest, checkpointing, save_minutes)

    @property
    def batch_tokens(self) -> int:
        """The largest scoring batch: the data module's, halved once if memory ran out."""
        return self._passes.batch_tokens

    def warm_up(self, settings: Warmup) -> Moments:
        """Bring the model to the scoring checkpoint θ; its second moment, or nothing without a warm-up.

        Raises:
            UserError: if the warm-up's loss stops being finite, or memory runs out.
        """
        if settings.fraction == 0:
            return {}
        keeper = PhaseKeeper(self._run, "warm-up", self._save_minutes)
        if (saved := self._run.load("warm-up")) is None:
            self._warm_up(settings, keeper)
            saved = self._run.load("warm-up")  # from where the moments need no memory until they are used
            assert saved is not None
        else:
            kept = _under("weight", saved[0])
            for name, parameter in self._model.named_parameters():
                local_shard(parameter.detach()).copy_(kept[name])
            self._log.restore(saved[1])
        keeper.drop()
        moments = _under("moment", saved[0])
        if settings.keep:
            self._keep_checkpoint(moments)
        return moments

    def _warm_up(self, settings: Warmup, keeper: PhaseKeeper) -> None:
        ids = settings.draw(self._data.train_examples.ok_ids(), self._seed)
        loader = self._data.training_loader(ids, self._seed)
        count = len(ids) * settings.epochs
        with (
            advising("in the warm-up", ADVICE),
            self._log.phase("warm-up", count, keeper.earlier, dealt=False) as keeper.meter,
        ):
            moments = warm_up(
                self._model, loader, settings.epochs, settings.learning_rate, keeper.meter, keeper, self._seed
            )
        weights = {f"weight:{name}": local_shard(p.detach()) for name, p in self._model.named_parameters()}
        moments = {f"moment:{name}": moment for name, moment in moments.items()}
        self._run.save("warm-up", {**weights, **moments}, self._log.latest())

    def _keep_checkpoint(self, moments: Moments) -> None:
        folder = self._run.path / "warmup"
        if on_rank_zero(folder.exists):  # whole, as it came here in one step
            return
        staged = self._run.staging()
        self._write_model(staged, moments)
        on_rank_zero(lambda: self._data.tokenizer.save_pretrained(staged))
        on_rank_zero(lambda: staged.replace(folder))

    def _write_model(self, folder: Path, moments: Moments) -> None:
        if is_sharded(self._model):
            save_sharded(self._model, folder)
            write_shards(moments, dict(self._model.named_parameters()), folder / SECOND_MOMENT)
        else:
            self._model.save_pretrained(folder)
            save_file({name: moment.contiguous() for name, moment in moments.items()}, folder / SECOND_MOMENT)

    def gradient(self, term: Term) -> Part:
        """A term's share of v = ∇V(θ): its weight over the number of its examples, and the sum of their gradients.

        Raises:
            UserError: if no example has a finite loss and gradient, or memory runs out.
        """
        return self._sum(term, "gradient")

    def squared_gradient(self, term: Term) -> Part:
        """A term's empirical Fisher, the same with squared entries.

        Raises:
            UserError: if no example has a finite loss and gradient, or memory runs out.
        """
        return self._sum(term, "squared gradient", squared=True)

    def hessian_vector(self, term: Term, direction: Mapping[str, Tensor], occasion: str = "") -> Part:
        """A term's share of H d, by differentiating twice.

        Args:
            term: The term.
            direction: d per trainable parameter.
            occasion: What sets this pass apart from an earlier one, for its name.

        Raises:
            UserError: if the model cannot be differentiated twice, or memory runs out.
        """
        derivative = HessianVectorProduct(self._model, direction)
        around = partial(twice_differentiable, self._model)
        name = f"Hessian-vector product{occasion}"
        return self._sum(term, name, around, derivative=derivative, shards=derivative.shards)

    def hessian_vector_difference(
        self, term: Term, direction: Mapping[str, Tensor], here: Part, occasion: str = ""
    ) -> tuple[Part, Part]:
        """A term's share of H d, as the central difference of two sums.

        Args:
            term: The term.
            direction: d per trainable parameter.
            here: The term's share of v.
            occasion: What sets these passes apart from earlier ones, for their names.

        Raises:
            UserError: if the weights are in half precision, the gradient jumps, or memory runs out.
        """
        check_differences(self._model)
        step = difference_step(self._model, direction)
        (weight, forward), (other, backward) = (
            self._sum(
                term,
                f"gradient a step {way}{occasion}",
                partial(displaced, self._model, direction, sign * step),
                moved=True,
            )
            for sign, way in ((1, "forward"), (-1, "backward"))
        )
        if not weight == other == here[0]:
            raise UserError(
                f"Some examples of the {term.kind} are finite at the scoring checkpoint but not near it, so there is "
                "no finite difference; set the scorer's method to exact."
            )
        check_smooth(forward, backward, here[1], term.kind)
        return (weight / (2 * step), forward), (-weight / (2 * step), backward)

    def _sum(
        self,
        term: Term,
        what: str,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
        moved: bool = False,
        **options: Any,
    ) -> Part:
        """A pass over a term, in some context, in which the weights may be displaced."""
        if (found := self._passes.finished(term.phase(what))) is None:
            with around(), term.losses(moved) as losses:
                found = self._passes.run(term.phase(what), term.examples, term.loader, losses=losses, **options)
        if not found.counted:
            raise UserError(
                f"No {term.phase('example')} has a finite loss and gradient at the scoring checkpoint; check the data "
                "and the weights."
            )
        return term.weight / found.counted, found.sums

    @property
    def bound(self) -> bool:
        """Whether the run's scores depend on a step size already."""
        return self._run.load(_STEP) is not None

    def bind(self, step_size: StepSize) -> None:
        """Bind the run to this step size: from here on its scores depend on it.

        Raises:
            UserError: if the run that goes on here was bound to another one.
        """
        kept = self._run.load(_STEP)
        if kept is None:
            self._run.save(_STEP, {}, {"step_size": step_size})
        elif kept[1]["step_size"] != step_size:
            raise UserError(
                f"{self._run.path} holds scores made with model.step_size {kept[1]['step_size']}, not {step_size}; "
                "resume it with that, or give --overwrite."
            )

    def pool_gradient(self, pool: list[int], name: str = "pool gradient") -> GradientPass:
        """Σ_i g_i over these examples: the statistics pass.

        Raises:
            UserError: if no example has a finite loss and gradient, or memory runs out.
        """
        found = self._passes.run(name, len(pool), partial(self._data.pool_loader, pool))
        if not found.counted:
            raise UserError("No example of data.train has a finite loss and gradient at the scoring checkpoint.")
        return found

    def scores(
        self,
        directions: Sequence[Mapping[str, Tensor]],
        pool: list[int],
        name: str = "scores",
        *,
        columns: bool,
        by_token: bool,
        measurement: Measurement,
    ) -> GradientPass:
        """The interaction matrix's rows over these examples for each u, and Σ_i g_i if it is not known yet.

        What is to be measured of each example is measured in the same pass.

        Raises:
            UserError: if a module cannot be scored, or memory runs out.
        """
        loader = partial(self._data.pool_loader, pool)
        return self._passes.run(
            name,
            len(pool),
            loader,
            directions=directions,
            columns=columns,
            by_token=by_token,
            measurement=measurement,
        )


def _longest(examples: Examples) -> int:
    return int(examples.lengths[examples.ok_ids()].max())


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(f"{prefix}:"): t for n, t in tensors.items() if n.startswith(f"{prefix}:")}
