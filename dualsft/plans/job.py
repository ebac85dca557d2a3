"""What a plan needs to know of a job, whichever command it is for."""

from dataclasses import dataclass, field
from typing import Literal

from dualsft.objectives.base_logits import is_on_host
from dualsft.plans.batch import BatchShape, scoring_batch, training_batch
from dualsft.plans.held import Shards
from dualsft.plans.passes import Running
from dualsft.plans.shape import ModelShape
from dualsft.selection.settings import SelectionSettings

ADAM_STATE = 8.0
"""Bytes of Adam's two moments of a float32 master."""

Step = Literal["foreach", "single", "fused"]


@dataclass(frozen=True)
class Machine:
    """Where a job runs.

    Attributes:
        device: ``cuda`` or ``cpu``.
        ranks: How many processes share the work.
        offload: Whether shards are stored on the host.
        memory: Bytes of a device, if known.
        replicas: How many copies of the weights they hold, each shared by as many.
        nodes: On how many machines they are.
    """

    device: str = "cuda"
    ranks: int = 1
    offload: bool = False
    memory: int | None = None
    replicas: int = 1
    nodes: int = 1

    @property
    def shards(self) -> int:
        """How many processes share one copy of the weights."""
        return self.ranks // self.replicas


@dataclass(frozen=True)
class DataSizes:
    """How much data there is, and in which batches.

    Attributes:
        batch_tokens: Tokens of the largest batch.
        max_length: Tokens of the longest example.
        batch_size: Examples of a training batch.
        supervised: Share of the tokens that are supervised.
        pool_tokens: Tokens of the pool; None if not known.
        validation_tokens: Tokens of the validation sets; None if not known.
        sets: How many validation sets there are.
    """

    batch_tokens: int = 8192
    max_length: int = 2048
    batch_size: int = 16
    supervised: float = 1.0
    pool_tokens: float | None = None
    validation_tokens: float | None = None
    sets: int = 1


@dataclass(frozen=True)
class Trained:
    """What is trained, and by which optimizer.

    Attributes:
        share: Of each tensor's weights; 1 for all.
        structured: Whether they are whole rows, of which alone linear layers compute the gradient.
        state: Bytes that the optimizer keeps for one of them.
        step: How its step works on the tensors: on all at once, with a copy of all masters in passing (``foreach``), on
            one after the other, with copies of it (``single``), or in place (``fused``).
        accumulated: Batches of a step: from the second on the gradients of the earlier ones are held.
        prior: Whether a prior term keeps the model near the base model, whose values of the trained weights are held.
        on_host: Whether masters, gradients and the optimizer's state are held on the host.
    """

    share: float = 1.0
    structured: bool = False
    state: float = ADAM_STATE
    step: Step = "foreach"
    accumulated: int = 1
    prior: bool = False
    on_host: bool = False


@dataclass(frozen=True)
class Job:
    """A job of scoring or training.

    Attributes:
        shape: The model.
        machine: Where it runs.
        data: How much data there is.
        running: How the model runs.
    """

    shape: ModelShape
    machine: Machine = field(default_factory=Machine)
    data: DataSizes = field(default_factory=DataSizes)
    running: Running = field(default_factory=Running)

    @property
    def shards(self) -> Shards:
        """What a rank holds of the weights."""
        shards = self.machine.shards
        return Shards(self.shape, shards, shards > 1 or self.machine.offload)

    @property
    def scoring(self) -> BatchShape:
        """The largest batch of a scoring pass."""
        return scoring_batch(self.data.batch_tokens, self.data.max_length, self.data.supervised)

    @property
    def training(self) -> BatchShape:
        """A rank's part of the largest training batch."""
        of = self.data
        return training_batch(of.batch_tokens, of.max_length, of.batch_size, self.machine.ranks, of.supervised)

    def logits_on_host(self, batch: BatchShape) -> dict[str, int]:
        """The bytes of the base model's logits that a prior's pass over this batch keeps on the host, if it does."""
        itemsize = 2 if self.running.autocast else self.shape.dtype.itemsize
        size = batch.num_supervised * self.shape.vocabulary * itemsize
        return {"base model's logits": size} if is_on_host(size, self.machine.device) else {}


@dataclass(frozen=True)
class SelectJob(Job):
    """A selection.

    Attributes:
        settings: Its options.
    """

    settings: SelectionSettings = field(default_factory=SelectionSettings)


@dataclass(frozen=True)
class FitJob(Job):
    """A fit.

    Attributes:
        trained: What is trained, and how.
        epochs: Passes over the chosen examples.
        data_share: Of the pool that is trained on.
        checkpoints: How many checkpoints the run keeps.
        batches: The most batches that are trained on, where that is limited.
    """

    trained: Trained = field(default_factory=Trained)
    epochs: int = 3
    data_share: float = 1.0
    checkpoints: int = 2
    batches: int | None = None
