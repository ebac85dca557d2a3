"""The phases that cost time: warm-up, gradients and scores; none is repeated by a run that goes on after a kill."""

from functools import partial

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from dualsft.data import Examples, InstructionDataModule
from dualsft.errors import UserError, advising
from dualsft.gradients import GradientPass
from dualsft.progress import PhaseLog
from dualsft.run_folder import RunFolder
from dualsft.selection.keeping import PhaseKeeper
from dualsft.selection.moments import SECOND_MOMENT, Moments
from dualsft.selection.passes import Passes
from dualsft.selection.warmup import ADVICE, Warmup, warm_up


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
        longest = max(_longest(examples) for examples in (data.train_examples, data.validation_sets["validation"]))
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
            self._model.load_state_dict(_under("weight", saved[0]), strict=False)
            self._log.restore(saved[1])
        keeper.drop()
        moments = {name: moment.to(self._model.device) for name, moment in _under("moment", saved[0]).items()}
        if settings.keep:
            self._keep_checkpoint(moments)
        return moments

    def _warm_up(self, settings: Warmup, keeper: PhaseKeeper) -> None:
        ids = settings.draw(self._data.train_examples.ok_ids(), self._seed)
        loader = self._data.training_loader(ids, self._seed)
        count = len(ids) * settings.epochs
        with advising("in the warm-up", ADVICE), self._log.phase("warm-up", count, keeper.earlier) as keeper.meter:
            moments = warm_up(
                self._model, loader, settings.epochs, settings.learning_rate, keeper.meter, keeper, self._seed
            )
        weights = {f"weight:{name}": p for name, p in self._model.named_parameters()}
        moments = {f"moment:{name}": moment for name, moment in moments.items()}
        self._run.save("warm-up", {**weights, **moments}, self._log.latest())

    def _keep_checkpoint(self, moments: Moments) -> None:
        folder = self._run.path / "warmup"
        if folder.exists():  # whole, as it came here in one step
            return
        staged = self._run.staging()
        self._model.save_pretrained(staged)
        self._data.tokenizer.save_pretrained(staged)
        save_file({name: moment.contiguous().cpu() for name, moment in moments.items()}, staged / SECOND_MOMENT)
        staged.replace(folder)

    def validation_gradient(self) -> dict[str, Tensor]:
        """v, the mean gradient over the validation examples, per parameter.

        Raises:
            UserError: if no validation example has a finite loss and gradient, or memory runs out.
        """
        count = len(self._data.validation_sets["validation"].ok_ids())
        loader = partial(self._data.validation_loader, "validation")
        found = self._passes.run("validation gradient", count, loader)
        if not found.counted:
            raise UserError(
                "No validation example has a finite loss and gradient at the scoring checkpoint; check the data."
            )
        return {name: total.div_(found.counted) for name, total in found.sums.items()}

    def pool_gradient(self, pool: list[int]) -> GradientPass:
        """Σ_i g_i over these examples: the statistics pass of a scorer whose direction depends on ḡ.

        Raises:
            UserError: if no example has a finite loss and gradient, or memory runs out.
        """
        found = self._passes.run("pool gradient", len(pool), partial(self._data.pool_loader, pool))
        if not found.counted:
            raise UserError("No example of data.train has a finite loss and gradient at the scoring checkpoint.")
        return found

    def scores(self, direction: dict[str, Tensor], pool: list[int], *, columns: bool, by_token: bool) -> GradientPass:
        """The interaction matrix's rows over these examples, and its columns if they are not known yet.

        Raises:
            UserError: if a module cannot be scored, or memory runs out.
        """
        loader = partial(self._data.pool_loader, pool)
        return self._passes.run("scores", len(pool), loader, directions=[direction], columns=columns, by_token=by_token)


def _longest(examples: Examples) -> int:
    return int(examples.lengths[examples.ok_ids()].max())


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(f"{prefix}:"): t for n, t in tensors.items() if n.startswith(f"{prefix}:")}
