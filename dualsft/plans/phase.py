"""One phase of a plan: what holds how many bytes, and how many operations it takes."""

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Phase:
    """The most that a phase holds at a time on one rank.

    Attributes:
        name: As the run's log names it.
        held: What -> bytes on the device, through the phase.
        batch: Bytes of a batch beyond that: activations, logits, gradients in passing, units gathered from other ranks.
        logits: Bytes of these in logits and tensors of their shape.
        step: Bytes of an optimizer step beyond what is held, in place of a batch.
        host: What -> bytes on the host, where the device is another.
        disk: What -> bytes that lie in the output folder in the phase, at the most, of all ranks.
        state: What -> bytes there of its own state under way, while it is kept from time to time.
        flops: Floating-point operations for a token of this phase's batches, all ranks together.
        tokens: How many tokens it passes over; None if that is not known.
    """

    name: str
    held: dict[str, int]
    batch: int = 0
    logits: int = 0
    step: int = 0
    host: dict[str, int] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)
    state: dict[str, int] = field(default_factory=dict)
    flops: float = 0.0
    tokens: float | None = None

    @property
    def peak(self) -> int:
        """Bytes on the device at the peak."""
        return sum(self.held.values()) + max(self.batch, self.step)

    def over(self, tokens: float | None) -> "Phase":
        """The same phase over so many tokens."""
        return replace(self, tokens=tokens)


@dataclass(frozen=True)
class Plan:
    """The phases of a job, in order, each on the rank that holds most."""

    phases: list[Phase]

    @property
    def highest(self) -> Phase:
        """The phase with the highest peak."""
        return max(self.phases, key=lambda phase: phase.peak)

    @property
    def host(self) -> int:
        """Bytes on a rank's host at the peak."""
        return max((sum(phase.host.values()) for phase in self.phases), default=0)

    @property
    def fullest(self) -> Phase:
        """The phase in which most lies in the output folder: what a killed run would resume from, and the result."""
        return max(self.phases, key=lambda phase: sum(phase.disk.values()))
