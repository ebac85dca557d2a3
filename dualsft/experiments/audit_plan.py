"""What an audit trains: variants of a selection whose predicted gains differ.

data         random subsets of the pool, and bands of the ranking of examples, with the chosen weights
parameters   random unions of blocks, mixtures of the chosen mask with random weights, and bands of the ranking by
             |φ|, on the chosen examples; random single weights all have the same predicted sum, and tell nothing
joint        pairs of the one and the other
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from dualsft.errors import UserError
from dualsft.experiments.variants import Draw, Variant

Side = Literal["data", "parameters", "joint"]
_CHOSEN: Draw = {"rule": "chosen"}
_LARGE_BLOCKS = 4
"""One in so many unions of blocks is of whole tensors, the others of rows."""


@dataclass(frozen=True)
class AuditOptions:
    """How much an audit trains.

    Args:
        sides: What is varied: the data, the parameters, or both at once (joint).
        runs: Random variants of the data, and of the parameters.
        bands: Bands of each ranking, as large as the choice: at a budget of a tenth, ten are the deciles.
        pairs: Subsets and masks that are paired each with each.
        sizes: Sizes of the random subsets as shares of the chosen one's; all are trained for as many steps.
        scorers: Whose predictions are compared, by registered name or class path; null for the selection's own.
        steps: Optimizer steps of the fits, one after another; null for as many as the ordinary fit has.
        learning_rates: Their learning rates; null for the ordinary one.
        seeds: How often each variant is trained, in other orders of its examples.
        held_out: Records of the target that nothing was chosen by, to measure gains on beside the validation set.
    """

    sides: list[Side] = field(default_factory=lambda: list(get_args(Side)))
    runs: int = 24
    bands: int = 10
    pairs: int = 4
    sizes: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0])
    scorers: list[str] | None = None
    steps: list[int] | None = None
    learning_rates: list[float] | None = None
    seeds: int = 1
    held_out: str | None = None

    def __post_init__(self) -> None:
        for name, least in {"runs": 0, "bands": 2, "pairs": 2, "seeds": 1}.items():
            if (value := getattr(self, name)) < least:
                raise UserError(f"audit.{name} is {value}; give at least {least}.")
        if strange := [side for side in self.sides if side not in get_args(Side)]:
            raise UserError(f"audit.sides has {strange[0]!r}; give some of {', '.join(get_args(Side))}.")
        for name in ("sides", "sizes", "scorers", "steps", "learning_rates"):
            if getattr(self, name) == []:
                raise UserError(f"audit.{name} is empty; name at least one, or leave it out.")
        positive = {"sizes": self.sizes, "steps": self.steps, "learning_rates": self.learning_rates}
        for name, values in positive.items():
            if odd := [value for value in values or [] if not value > 0]:
                raise UserError(f"audit.{name} has {odd[0]}; give positive numbers.")


@dataclass(frozen=True)
class Variation:
    """One variant to train.

    Attributes:
        side: What of it differs from the selection.
        family: How it was drawn.
        label: Which of its family it is, for tables.
        variant: What it takes.
    """

    side: Side
    family: Literal["chosen", "random", "band", "blocks", "mixture", "pair"]
    label: str
    variant: Variant


@dataclass(frozen=True)
class Sizes:
    """How many examples and weights there are, and are chosen."""

    pool: int
    examples: int
    weights: int
    chosen_weights: int


def variations(sizes: Sizes, options: AuditOptions) -> list[Variation]:
    """Everything that is trained at each setting, the selection itself first.

    Raises:
        UserError: if a side that is to be varied was chosen whole.
    """
    _check_varied(sizes, options)
    drawn: list[Variation] = []
    if "data" in options.sides:
        drawn += _of_data(sizes, options)
    if "parameters" in options.sides:
        drawn += _of_weights(sizes, options)
    if "joint" in options.sides:
        drawn += _pairs(sizes, options)
    return drawn


def _check_varied(sizes: Sizes, options: AuditOptions) -> None:
    whole = {"data": sizes.examples >= sizes.pool, "parameters": sizes.chosen_weights >= sizes.weights}
    for side, all_taken in whole.items():
        if all_taken and (side in options.sides or "joint" in options.sides):
            raise UserError(
                f"The selection took all of the {side}, so there is nothing to compare its choice with; audit a "
                f"selection with a budget, or set audit.sides to the other side."
            )


def _of_data(sizes: Sizes, options: AuditOptions) -> Iterator[Variation]:
    yield Variation("data", "chosen", "chosen", {"examples": _CHOSEN, "weights": _CHOSEN})
    for draw in _random_subsets(sizes, options):
        label = f"{draw['count']} examples, seed {draw['seed']}"
        yield Variation("data", "random", label, {"examples": draw, "weights": _CHOSEN})
    for band in range(options.bands):
        ranked: Draw = {"rule": "band", "count": sizes.examples, "band": band, "bands": options.bands}
        yield Variation("data", "band", f"band {band}", {"examples": ranked, "weights": _CHOSEN})


def _random_subsets(sizes: Sizes, options: AuditOptions) -> Iterator[Draw]:
    for seed in range(options.runs):
        share = options.sizes[seed % len(options.sizes)]
        count = min(max(round(share * sizes.examples), 1), sizes.pool)
        yield {"rule": "random", "count": count, "seed": seed}


def _of_weights(sizes: Sizes, options: AuditOptions) -> Iterator[Variation]:
    yield Variation("parameters", "chosen", "chosen", {"examples": _CHOSEN, "weights": _CHOSEN})
    for draw in _random_masks(sizes, options.runs):
        family: Literal["blocks", "mixture"] = "mixture" if draw["rule"] == "mixture" else "blocks"
        yield Variation("parameters", family, _label(draw), {"examples": _CHOSEN, "weights": draw})
    for band in range(options.bands):
        ranked: Draw = {"rule": "band", "count": sizes.chosen_weights, "band": band, "bands": options.bands}
        yield Variation("parameters", "band", f"band {band}", {"examples": _CHOSEN, "weights": ranked})


def _random_masks(sizes: Sizes, count: int) -> Iterator[Draw]:
    """Unions of blocks and mixtures in turn, so that their predicted sums differ."""
    for seed in range(count):
        if seed % 2:
            yield {"rule": "mixture", "share": _share(sizes, (seed // 2 + 0.5) / max(count // 2, 1)), "seed": seed}
        else:
            block: Literal["module", "row"] = "module" if seed // 2 % _LARGE_BLOCKS == 0 else "row"
            yield {"rule": "blocks", "count": sizes.chosen_weights, "seed": seed, "block": block}


def _share(sizes: Sizes, place: float) -> float:
    """The share of the chosen weights that a mixture keeps: of a large choice some must stay, as few are outside."""
    least = max(0.0, 2 - sizes.weights / sizes.chosen_weights)
    return least + place * (1 - least)


def _label(draw: Draw) -> str:
    if draw["rule"] == "mixture":
        return f"{draw['share']:.0%} of the chosen, seed {draw['seed']}"
    return f"{draw.get('block', 'row')}s, seed {draw['seed']}"


def _pairs(sizes: Sizes, options: AuditOptions) -> Iterator[Variation]:
    """The chosen, the lowest and random examples, each with the chosen, the lowest and mixed weights."""
    for a, examples in enumerate(_subsets_to_pair(sizes, options.pairs, options.bands)):
        for b, weights in enumerate(_masks_to_pair(sizes, options.pairs, options.bands)):
            yield Variation("joint", "pair", f"examples {a}, weights {b}", {"examples": examples, "weights": weights})


def _subsets_to_pair(sizes: Sizes, count: int, bands: int) -> Sequence[Draw]:
    lowest: Draw = {"rule": "band", "count": sizes.examples, "band": bands - 1, "bands": bands}
    more: list[Draw] = [{"rule": "random", "count": sizes.examples, "seed": seed} for seed in range(count - 2)]
    return [_CHOSEN, lowest, *more]


def _masks_to_pair(sizes: Sizes, count: int, bands: int) -> Sequence[Draw]:
    lowest: Draw = {"rule": "band", "count": sizes.chosen_weights, "band": bands - 1, "bands": bands}
    shares = [_share(sizes, (k + 1) / (count - 1)) for k in range(count - 2)]
    more: list[Draw] = [{"rule": "mixture", "share": share, "seed": seed} for seed, share in enumerate(shares)]
    return [_CHOSEN, lowest, *more]
