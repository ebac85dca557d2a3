"""The options of `dualsft select` under ``model.``: to add one, add a field here.

The role of a field says what the option decides. From the roles follow the option's place in the manifest, whether a
resumed run must agree with it, and whether `dualsft allocate` can change it.
"""

# ruff: noqa: RUF009 (`option` makes a field)

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeAlias, TypeVar

from dualsft.allocators import (
    Budget,
    DataAllocator,
    ExampleStatistic,
    GlobalTopK,
    ParameterAllocator,
    TopK,
    check_budget,
)
from dualsft.errors import UserError
from dualsft.models.loading import Dtype
from dualsft.objectives import Objective
from dualsft.paths import ScoringPath
from dualsft.scorers import FirstOrder, Scorer
from dualsft.selection.checks import (
    Order,
    check_allocators,
    check_contributions,
    check_needs,
    check_objectives,
    check_order,
    check_path,
    check_preconditioner,
    check_stability,
    check_step_size,
)
from dualsft.selection.directions import Combination
from dualsft.selection.json_values import at, describe_part, typed
from dualsft.selection.near_duplicates import NearDuplicates
from dualsft.selection.normalization import Normalize
from dualsft.selection.offload import Offload
from dualsft.selection.paths.settings import PathSettings
from dualsft.selection.prior import Prior
from dualsft.selection.step import StepSize
from dualsft.selection.warmup import Warmup

T = TypeVar("T")
if TYPE_CHECKING:
    OrDefault: TypeAlias = Annotated[T, "may be given as null"]
else:

    class OrDefault:
        """An option for which the command line accepts null; `__post_init__` replaces null by the default."""

        def __class_getitem__(cls, kind: Any) -> Any:
            return kind | None


Preconditioning = Literal["none", "adam"]
KeptScores = Literal["full", "bfloat16", "none"]
Role = Literal["objective", "direction", "published", "step", "parameters", "data", "running"]
"""What an option decides:

    objective     the terms of V, the point θ at which v = ∇V(θ) is taken, and which side is scored by which
    direction     the direction u that scores both sides
    published     which files are written beside the choice
    step          η, which a resumed run may change until u depends on it
    parameters    which weights are chosen by their scores
    data          which examples are chosen by theirs
    running       how the model is held and run; the manifest describes the model instead
"""
_GROUPS: dict[Role, int] = {"objective": 0, "direction": 1, "published": 2, "step": 3, "parameters": 4, "data": 4}


class Option(NamedTuple):
    """One option, as the manifest has it."""

    name: str
    type: Any
    role: Role
    key: str  # in the manifest; SECTION.KEY where options share a section
    later: bool  # whether some manifests are older than the option; they mean its default


def option(default: Any, role: Role, *, key: str = "", later: bool = False) -> Any:
    """A dataclass field with a default and `Option` metadata; the manifest's key is the field's name unless given."""
    return field(default=default, metadata={"role": role, "key": key, "later": later})


@dataclass(frozen=True)
class SelectionSettings:
    """What is scored, by which rule, and what is chosen by the scores.

    Args:
        scorer: The rule for the direction u that scores both sides.
        preconditioner: The optimizer that the fine-tune will use: none (SGD) or adam, which needs the second moment of
            a warm-up.
        normalize: What an example's score at a checkpoint is counted per: the mean loss of a token (none), the loss
            summed over the tokens (tokens), or the length of the example's own gradient (gradient_norm: the cosine).
        path: The path along which everything is scored, in place of one scoring checkpoint.
        step_size: η, the length of the step whose gain is predicted: a number, or auto for the step at which a
            second-order scorer predicts the largest gain. At first order it scales all scores alike.
        parameter_budget: Weights to train: a fraction in (0, 1], a count, or null for all.
        data_budget: Examples to train on: a fraction in (0, 1] of those with a response, a count, or null for all.
        parameter_allocator: The rule that spends the parameter budget.
        data_allocator: The rule that spends the data budget.
        near_duplicates: Which texts count as the same; of those only the one with the highest score may be chosen.
        trainable: Patterns for the parameters that may be chosen, such as q_proj and layers.[0-3]. for all names that
            contain one; null for all. The parameter budget is a share of these; all others are scored all the same.
        frozen: Patterns for the parameters that may not be chosen even so, such as embed and norm.
        warmup: How the scoring checkpoint is made.
        prior: The objective's second term, which keeps what the base model knew.
        objectives: Further terms of one's own, by class path.
        combination: How an example's, or a weight's, scores for several validation sets become one.
        order: both chooses each side by one scoring of everything; parameters, or data, chooses that side and takes the
            other whole; parameters_then_data re-scores the examples by the chosen weights alone, data_then_parameters
            the weights by the chosen examples alone.
        rounds: How often the two sides are re-scored by each other in the last two orders.
        dtype: Type that the weights are stored and computed in while scoring; sums are float32 regardless. auto is the
            checkpoint's, but float32 in place of bfloat16 on a CPU that cannot multiply it, which is said.
        gradient_checkpointing: Recompute activations in the backward pass, to save memory.
        offload_optimizer: Whether the warm-up, or a path's training, holds float32 copies, gradients and moments of all
            weights on the host (always) or on the device (never); auto holds them on the host if they would take more
            than three quarters of the device's free memory, and says so.
        offload_sums: Whether passes hold their sums of gradients on the host (always), to which each layer's gradient
            goes while backward goes on, or on the device (never); auto holds them on the host if they would take more
            than three quarters of what is free beside weights and directions, or memory has run out, and says so.
        compile: Compile the model's layers by torch.compile for all that is not scored: the warm-up, the training of a
            path, the validation gradient and plain losses. Passes that score run as they do without.
        parameter_scores: How the scores of weights are kept: full is 4 bytes each; bfloat16 takes 2, and what `dualsft
            allocate` chooses by them may differ from what select would; none keeps the choice alone, and allocate can
            change the examples only.
        token_scores: Keep the contribution of each token to its example's score too; takes longer.
        stability: Score everything by each half of the validation set too, and tell how far the halves agree on the
            order; takes two more directions in memory, and longer.
        save_minutes: How often to keep the state of the phase under way, for --resume.

    Raises:
        UserError: if an option is out of range, or two contradict each other.
    """

    scorer: OrDefault[Scorer] = option(None, "direction")
    preconditioner: Preconditioning = option("adam", "direction")
    normalize: Normalize = option("none", "direction", later=True)
    path: PathSettings = option(PathSettings(), "direction", later=True)
    step_size: StepSize = option(2e-5, "step")
    parameter_budget: Budget = option(0.1, "parameters", key="budgets.parameters")
    data_budget: Budget = option(0.1, "data", key="budgets.data")
    parameter_allocator: OrDefault[ParameterAllocator] = option(None, "parameters")
    data_allocator: OrDefault[DataAllocator] = option(None, "data")
    near_duplicates: NearDuplicates = option(NearDuplicates(), "data", later=True)
    trainable: OrDefault[list[str]] = option(None, "parameters", later=True)
    frozen: OrDefault[list[str]] = option(None, "parameters", later=True)
    warmup: Warmup = option(Warmup(), "objective")
    prior: Prior = option(Prior(), "objective")
    objectives: OrDefault[list[Objective]] = option(None, "objective")
    combination: Combination = option("mean", "objective")
    order: Order = option("both", "objective", key="order.name")
    rounds: int = option(1, "objective", key="order.rounds")
    dtype: Dtype = option("auto", "running")
    gradient_checkpointing: bool = option(False, "running")
    offload_optimizer: Offload = option("auto", "running")
    offload_sums: Offload = option("auto", "running")
    compile: bool = option(False, "running")
    parameter_scores: KeptScores = option("full", "published", later=True)
    token_scores: bool = option(False, "published")
    stability: bool = option(False, "published", later=True)
    save_minutes: float = option(10.0, "running")

    def __post_init__(self) -> None:
        check_budget("model.parameter_budget", self.parameter_budget)
        check_budget("model.data_budget", self.data_budget)
        if not self.save_minutes > 0:
            raise UserError(f"model.save_minutes is {self.save_minutes}; give a positive number of minutes.")
        self._fill(scorer=self.scorer or FirstOrder())
        if self.path.along is not None:
            self._fill(path=replace(self.path, normalize=self.path.normalization))
        if self.uses_scorer:
            given = self.path.along is not None or self.warmup.gives_second_moment
            check_preconditioner(self.preconditioner, given)
            check_needs(self.scorer, given)
        check_path(self.path, self.warmup, self.normalize, self.prior.weight, self.objectives or [])
        check_step_size(self.step_size, self.scorer)
        check_order(self.order, self.rounds)
        check_contributions(self.path, self.order, self.rounds, self.token_scores)
        check_stability(self.stability, self.path)
        if self.order == "data":  # the other side is taken whole
            self._fill(parameter_budget=None, parameter_allocator=None)
        if self.order == "parameters":
            self._fill(data_budget=None, data_allocator=None)
        self._fill(
            parameter_allocator=self.parameter_allocator or GlobalTopK(),
            data_allocator=self.data_allocator or TopK(),
            trainable=self.trainable or [],
            frozen=self.frozen or [],
            objectives=self.objectives or [],
        )
        check_allocators(self.parameter_allocator, self.data_allocator)
        check_objectives([self.prior.term(), *self.objectives])

    @property
    def path_rule(self) -> ScoringPath:
        """The rule of the path, where there is one."""
        assert self.path.along is not None
        return self.path.along

    @property
    def uses_scorer(self) -> bool:
        """Whether the scorer and the preconditioner take part: not along a path with directions of its own."""
        return self.path.along is None or bool(self.path.along.needs)

    @property
    def needs_second_moment(self) -> bool:
        """Whether anything uses the second moment of Adam, the warm-up's or along a path its own."""
        return self.preconditions or (self.uses_scorer and "second_moment" in self.scorer.needs)

    @property
    def needs_second_moment_of_warmup(self) -> bool:
        """Whether the second moment at the scoring checkpoint is used: not along a path, which is trained further."""
        return self.needs_second_moment and self.path.along is None

    @property
    def preconditions(self) -> bool:
        """Whether the preconditioner is Adam's, P = 1/(sqrt(ĉ)+eps), and not 1."""
        return self.uses_scorer and self.preconditioner == "adam"

    @property
    def chooses_weights(self) -> bool:
        """Whether some weights are taken, and not all."""
        return self.parameter_budget is not None

    @property
    def scores_weights(self) -> bool:
        """Whether weights are scored: not along a complete path if all are taken."""
        return self.chooses_weights or self.path.along is None or not self.path_rule.is_complete

    @property
    def norm(self) -> ExampleStatistic:
        """The norm of an example's gradient by which the cosine divides."""
        return "preconditioned_gradient_norm" if self.preconditions else "gradient_norm"

    @property
    def statistics(self) -> tuple[ExampleStatistic, ...]:
        """The statistics that are measured of each example, for the data allocator and the normalisation."""
        needs = self.data_allocator.needs
        return tuple({*needs, self.norm}) if self.normalize == "gradient_norm" else needs

    def _fill(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)


def options(kind: type[SelectionSettings] = SelectionSettings) -> list[Option]:
    """All options, in the order of their fields."""
    return [
        Option(of.name, of.type, of.metadata["role"], of.metadata["key"] or of.name, of.metadata["later"])
        for of in fields(kind)
    ]


def recorded(kind: type[SelectionSettings] = SelectionSettings) -> list[Option]:
    """The options that the manifest holds, in its order: by role, and of each role those that share a section last."""
    found = [option for option in options(kind) if option.role in _GROUPS]
    return sorted(found, key=lambda option: (_GROUPS[option.role], "." in option.key))


def keys(*roles: Role) -> list[str]:
    """The manifest's keys, sections among them, that hold the options with these roles."""
    return list(dict.fromkeys(option.key.partition(".")[0] for option in recorded() if option.role in roles))


CHOICE = tuple(option.name for option in options() if option.role in ("parameters", "data"))
"""The options that `dualsft allocate` can change: those of what is chosen by given scores."""


def describe_settings(settings: SelectionSettings) -> dict[str, Any]:
    """The options as the manifest holds them, in its order."""
    described: dict[str, Any] = {}
    for option in recorded(type(settings)):
        section, _, key = option.key.rpartition(".")
        place = described.setdefault(section, {}) if section else described
        place[key] = _described(getattr(settings, option.name))
    return described


def _described(value: Any) -> Any:
    """The value of an option as JSON."""
    if isinstance(value, Objective):
        return {**describe_part(value), "name": value.name, "weight": value.weight}
    if isinstance(value, list):
        return [_described(one) for one in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {of.name: _described(getattr(value, of.name)) for of in fields(value)}
    return value if value is None or isinstance(value, (bool, int, float, str)) else describe_part(value)


def add_later_options(stored: dict[str, Any], kind: type[SelectionSettings] = SelectionSettings) -> None:
    """Put the options that are younger than a manifest into it, with their defaults."""
    default = describe_settings(kind())
    for option in recorded(kind):
        if option.later:
            section, _, key = option.key.rpartition(".")
            place = at(stored, section) if section else stored
            if isinstance(place, dict):
                place.setdefault(key, at(default, option.key))


def stored_settings(stored: Mapping[str, Any], kind: type[SelectionSettings] = SelectionSettings) -> dict[str, Any]:
    """The options that a manifest holds: name -> value, `Part` for a part; a `Mismatch` if one has a wrong type."""
    return {option.name: typed(option.type, at(stored, option.key), option.key) for option in recorded(kind)}
