"""What rounding does to the scores of the trained model that is shipped, and what it cannot do."""

from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics import (
    MODEL,
    WAYS,
    Agreement,
    Checkpoint,
    Scores,
    agreement,
    autograd_pass,
    draw,
    embedded_data,
    relative_error,
    score,
    shipped,
    warmed_up,
)
from torch import Tensor
from transformers import PreTrainedModel

from dualsft import InstructionDataModule
from dualsft.data.batches import collate
from dualsft.data.packing import collate_packed
from dualsft.errors import UserError
from dualsft.matrix.pass_result import GradientPass
from dualsft.matrix.passes import Batches, gradient_pass
from dualsft.models.loading import Dtype
from dualsft.quickstart import GSM8K
from dualsft.scorers import FirstOrder
from dualsft.selection.directions import Statistics, preconditioner, scorer_direction
from dualsft.selection.passes import scoring_mode
from tests.cases import given
from tests.world.jobs import SGD, Inputs, select, write_inputs

Reference = tuple[Checkpoint, list[int], Scores]

LONGEST = 256
VALIDATION = GSM8K / "validation.jsonl"


@pytest.fixture(scope="session")
def validation(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Every eighth row of the embedded validation set."""
    lines = VALIDATION.read_text(encoding="utf-8").splitlines(keepends=True)[::8]
    path = tmp_path_factory.mktemp("validation") / "validation.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def data(validation: str) -> InstructionDataModule:
    """The embedded pool, and some of its validation set."""
    return embedded_data(validation=validation)


@pytest.fixture(scope="module")
def references(data: InstructionDataModule) -> Callable[[str], Reference]:
    """Where to score, which examples, and their scores by float64 autograd over one example at a time; made once."""

    @cache
    def made(direction: str) -> Reference:
        checkpoint, ids = shipped() if direction == "sgd" else warmed_up(data), draw(data, 64)
        return checkpoint, ids, score(checkpoint.model("float64"), checkpoint.moments, data, ids, autograd_pass)

    return made


def agreement_of(way: str, data: InstructionDataModule, reference: Reference) -> Agreement:
    """How near the scores by this type of number come to the reference."""
    (dtype, run), (checkpoint, ids, expected) = WAYS[way], reference
    return agreement(score(checkpoint.model(dtype), checkpoint.moments, data, ids, run), expected)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("direction", "way"), [("sgd", "bfloat16"), ("sgd", "float32, bfloat16 autocast"), ("adam", "bfloat16")]
)
def test_bfloat16_ranks_as_float64_does(
    direction: str, way: str, data: InstructionDataModule, references: Callable[[str], Reference]
) -> None:
    """The whole chain in bfloat16 orders the examples, and chooses a tenth of the weights, as float64 does."""
    found = agreement_of(way, data, references(direction))
    assert found.spearman >= 0.99, found
    assert found.pearson >= 0.999, found
    assert found.overlap >= 0.97, found


@pytest.mark.heavy
def test_float32_scores_equal_float64_scores(
    data: InstructionDataModule, references: Callable[[str], Reference]
) -> None:
    """The whole chain in float32 gives the scores of float64 to five digits."""
    found = agreement_of("float32", data, references("sgd"))
    assert found.example_error <= 1e-5, found
    assert found.weight_error <= 1e-5, found
    assert found.overlap >= 0.9999, found


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """The trained model in float32."""
    return shipped().model("float32")


@pytest.fixture(scope="module")
def short(data: InstructionDataModule) -> list[int]:
    """Some of the pool's examples that fit into the smallest batch."""
    return draw(data, 16, longest=LONGEST)


def direction_at(model: PreTrainedModel, data: InstructionDataModule, count: int) -> dict[str, Tensor]:
    """U = (η/n) v for a pool of this many examples and the step size 2e-5."""
    found = gradient_pass(model, lambda first: data.validation_loader(start=first))
    gradient = {name: total / found.counted for name, total in found.sums.items()}
    return dict(scorer_direction(FirstOrder(), Statistics(model, gradient, preconditioner(model, None), count), 2e-5))


@pytest.fixture(scope="module")
def u(model: PreTrainedModel, data: InstructionDataModule, short: list[int]) -> dict[str, Tensor]:
    """U for the short examples."""
    return direction_at(model, data, len(short))


@pytest.fixture(scope="module")
def alone(model: PreTrainedModel, data: InstructionDataModule, short: list[int], u: dict[str, Tensor]) -> GradientPass:
    """The short examples' scores, each in a batch of its own."""
    return gradient_pass(model, given([batch for i in short for batch in data.pool_loader([i])]), directions=[u])


Batcher = Callable[[InstructionDataModule, list[int]], Batches]


def padded(batch_tokens: int) -> Batcher:
    """Batches of at most this many tokens, sorted by length."""
    return lambda data, ids: lambda first: data.pool_loader(ids, first, batch_tokens)


def packed(_: InstructionDataModule, ids: list[int]) -> Batches:
    """Rows of several examples."""
    data = embedded_data(packing=True, max_length=LONGEST, batch_tokens=1024)
    return lambda first: data.pool_loader(ids, first)


def shuffled(data: InstructionDataModule, ids: list[int]) -> Batches:
    """Batches of examples of all lengths, in no order."""
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(1)).tolist()
    rows = [data.train_examples.dataset[ids[k]] for k in order]
    return given([collate(rows[first : first + 7], pad_token_id=0) for first in range(0, len(rows), 7)])


COMPANY: dict[str, Batcher] = {
    "256 tokens": padded(256),
    "4096 tokens": padded(4096),
    "shuffled": shuffled,
    "packed": packed,
    "checkpointed": padded(1024),
}


@pytest.mark.heavy
@pytest.mark.parametrize("company", COMPANY)
def test_scores_do_not_depend_on_the_batches(
    company: str,
    model: PreTrainedModel,
    data: InstructionDataModule,
    short: list[int],
    u: dict[str, Tensor],
    alone: GradientPass,
) -> None:
    """However examples are batched, padded, packed or recomputed, scores are those of each alone to five digits."""
    with scoring_mode(model, checkpointing=company == "checkpointed"):
        found = gradient_pass(model, COMPANY[company](data, short), directions=[u])
    assert found.rows[0] == pytest.approx(alone.rows[0], rel=0.0, abs=1e-5 * max(map(abs, alone.rows[0].values())))
    assert relative_error((found.sums[name], total) for name, total in alone.sums.items()) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_batches_give_the_same_bits(dtype: Dtype, packing: bool, data: InstructionDataModule) -> None:
    """Two passes over the same batches agree in every bit of every score."""
    model, rows = shipped().model(dtype), [data.train_examples.dataset[i] for i in draw(data, 8)]
    batches: list[Any] = (
        [collate_packed([rows[:2], rows[2:4]], 0), collate_packed([rows[4:6], rows[6:]], 0)]
        if packing
        else [collate(rows[:4], 0), collate(rows[4:], 0)]
    )
    direction = {name: torch.full_like(p, 1e-9, dtype=torch.float32) for name, p in model.named_parameters()}
    first, second = (gradient_pass(model, given(batches), directions=[direction]) for _ in range(2))
    assert first.rows == second.rows
    assert all(torch.equal(total, second.sums[name]) for name, total in first.sums.items())


def share_of_zeros(tensors: Iterable[Tensor], dtype: torch.dtype) -> float:
    """Share of the entries that are zero in this type."""
    counts = [(int((tensor.to(dtype) == 0).sum()), tensor.numel()) for tensor in tensors]
    return sum(zeros for zeros, _ in counts) / sum(count for _, count in counts)


@pytest.mark.heavy
def test_small_scores_are_not_lost(model: PreTrainedModel, validation: str, tmp_path: Path) -> None:
    """At the step size 2e-5 float16 would lose u, and with it the scores; here next to no entry is zero."""
    lines = (GSM8K / "pool.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[::20]
    (tmp_path / "pool.jsonl").write_text("".join(lines), encoding="utf-8")
    inputs = Inputs(MODEL, str(tmp_path / "pool.jsonl"), validation)
    options = {"max_length": 512, "batch_tokens": 2048}
    selection = select(inputs, tmp_path / "out", {**SGD, "step_size": 2e-5, "dtype": "float32"}, options)

    data = inputs.data(**options)
    u = direction_at(model, data, len(lines))
    assert share_of_zeros(u.values(), torch.float32) < 1e-6
    assert share_of_zeros(u.values(), torch.float16) > 0.9999

    weights = selection.parameter_scores().values()
    assert {score.dtype for score in weights} == {torch.float32}
    assert share_of_zeros(weights, torch.float32) < 1e-6
    assert share_of_zeros(weights, torch.float16) > 0.9999

    scores = torch.tensor(selection.examples["score"].to_pylist(), dtype=torch.float64)
    assert selection.examples.schema.field("score").type == "double"
    assert len(scores.unique()) == len(lines)
    assert len(scores.half().unique()) < len(lines) / 4

    rounded = {name: direction.half().float() for name, direction in u.items()}
    found = gradient_pass(model, lambda first: data.pool_loader(None, first), directions=[rounded], columns=False)
    rows = torch.tensor([found.rows[0][i] for i in range(len(lines))], dtype=torch.float64)
    assert relative_error([(rows, scores)]) > 0.5


@pytest.mark.parametrize("way", ["16-true", "autocast"])
def test_float16_is_refused_whoever_asks_for_it(way: str, tmp_path: Path) -> None:
    """A float32 checkpoint is not scored in float16 either, by the trainer's precision or under somebody's autocast."""
    inputs, precision = write_inputs(tmp_path), "32-true" if way == "autocast" else way
    with (
        torch.autocast("cpu", torch.float16, enabled=way == "autocast"),
        pytest.raises(UserError, match="Scores underflow in float16"),
    ):
        select(inputs, tmp_path / "out", SGD, precision=precision)
