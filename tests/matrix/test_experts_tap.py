"""The tap on grouped experts: scores are autograd's over a loop of experts, at a cost that does not grow with them."""

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from dualsft.data.layout import Batch, Layout
from dualsft.matrix import model_calls
from dualsft.matrix.interaction import ColumnSums, RowSums
from dualsft.matrix.passes import gradient_pass
from dualsft.models.experts import group_experts
from dualsft.objectives.inputs import settle_mask
from dualsft.selection.passes import scoring_mode
from tests.cases import _SIZES, collate, given, make, make_examples, pack, random_direction
from tests.models.test_experts import KINDS, WIDTH, Model
from tests.references import assert_rows, assert_same_gradients, float64_throughout, gradient_loop, total
from tests.world.accelerator import HostWaits

FLOAT64 = 1e-12

ROUTINGS = {
    "mixed": [[[0, 1], [2, 0], [1, 2], [3, 0]], [[3, 1], [0, 2], [1, 0], [2, 3]], [[2, 3], [0, 1], [3, 0], [1, 3]]],
    "an expert without tokens": [[[0, 1], [2, 0], [1, 2], [0, 2]]] * 2 + [[[2, 1], [0, 2], [1, 0], [0, 1]]],
    "one expert for all": [[[2]] * 4] * 3,
    "an expert for one example": [[[0, 1]] * 4, [[3, 0]] * 4, [[1, 0]] * 4],
    "one expert twice": [[[1, 1], [0, 0], [1, 2], [0, 1]], [[3, 3], [0, 2], [2, 2], [0, 3]], [[2, 2], [0, 1]] * 2],
}
"""The experts of each token of three examples of four tokens."""
SPANS = {"full": [(0, 0, 4), (1, 0, 4), (2, 0, 4)], "padded": [(0, 0, 4), (1, 0, 1), (2, 0, 2)]}
PACKED = [(0, 0, 2), (0, 2, 1), (1, 0, 4), (2, 1, 2)]
"""Row, first token and length of each example."""


class Routed(nn.Module):
    """Experts to which a table sends the tokens of a batch."""

    def __init__(self, kind: str, routing: list[list[list[int]]]) -> None:
        super().__init__()
        self.model = Model(kind)
        self.routing = torch.tensor(routing)
        generator = torch.Generator().manual_seed(4)
        self.shares = torch.rand(self.routing.shape, generator=generator, dtype=torch.float64)
        self.tokens = torch.randn(3, 4, WIDTH, generator=generator, dtype=torch.float64)

    def forward(self, rows: slice, tokens: slice) -> Tensor:
        """The output for a rectangle of the table's tokens, squared."""
        parts = (part[rows, tokens].flatten(0, 1) for part in (self.tokens, self.routing, self.shares))
        return self.model.experts(*parts).unflatten(0, self.tokens[rows, tokens].shape[:2]).square().sum(-1)

    def references(self, spans: list[tuple[int, int, int]]) -> list[dict[str, Tensor]]:
        """The gradient of each example alone, by a loop over its experts."""
        self.model.set_experts_implementation("eager")
        found = []
        for row, first, length in spans:
            self(slice(row, row + 1), slice(first, first + length)).sum().backward()
            zeros = {n: torch.zeros_like(p) for n, p in self.named_parameters()}
            found.append({n: zeros[n] if p.grad is None else p.grad for n, p in self.named_parameters()})
            self.zero_grad(set_to_none=True)
        return found


@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=list(ROUTINGS))
@pytest.mark.parametrize("spans", [*SPANS.values(), PACKED], ids=[*SPANS, "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_columns_are_those_of_single_examples(kind: str, spans: Any, routing: Any) -> None:
    """In float64, of two directions, by token too, however tokens are spread over experts and examples over rows."""
    model = Routed(kind, routing)
    expected = model.references(spans)
    group_experts(model.model)  # type: ignore[arg-type]
    us: list[Any] = [random_direction(model, seed) for seed in (2, 3)]  # type: ignore[arg-type]
    layout = Layout(3, 4, spans)
    everywhere = slice(None)
    for by_token in (False, True):
        with ColumnSums(model) as columns, RowSums(model, us, by_token) as rows:
            rows.begin(layout)
            layout.by_example(_only(spans) * model(everywhere, everywhere)).sum().backward()
            found, covered = rows.read(), rows.covered
            if by_token:
                torch.testing.assert_close(rows.read_tokens(1).sum(1), found[1], rtol=1e-12, atol=1e-11)
        assert covered == set(us[0])
        for of_direction, u in zip(found, us, strict=True):
            assert_rows(of_direction.tolist(), u, expected, FLOAT64)
        assert_same_gradients(columns.sums, total(expected), FLOAT64)


def _only(spans: list[tuple[int, int, int]]) -> Tensor:
    """One for the tokens of examples, zero for padding."""
    inside = torch.zeros(3, 4, dtype=torch.float64)
    for row, first, length in spans:
        inside[row, first : first + length] = 1
    return inside


def test_weights_may_be_frozen_apart() -> None:
    """Rows of some of the experts' parameters alone are those of these, and the others' product is not formed."""
    model = Routed("biased and transposed", ROUTINGS["mixed"])
    expected = model.references(SPANS["full"])
    group_experts(model.model)  # type: ignore[arg-type]
    for names in (["down_proj"], ["gate_up_proj_bias"], ["down_proj", "down_proj_bias"]):
        for name, parameter in model.model.experts.named_parameters():
            parameter.requires_grad_(name in names)
        u: Any = random_direction(model)  # type: ignore[arg-type]
        with RowSums(model, [u]) as rows:
            rows.begin(Layout(3, 4, SPANS["full"]))
            model(slice(None), slice(None)).sum().backward()
            assert_rows(rows.read()[0].tolist(), u, [{n: g[n] for n in u} for g in expected], FLOAT64)


def qwen2_moe() -> Any:
    """A shared expert behind a gate of its own, beside narrow routed ones."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 20}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**_SIZES, **options, num_experts=4, num_experts_per_tok=2))


@pytest.mark.parametrize("packed", [False, True])
def test_a_shared_expert_is_scored_beside(packed: bool) -> None:
    """Rows and columns of a whole model, padded and packed, are autograd's over single examples."""
    model, examples = qwen2_moe().double().eval(), make_examples()
    model.set_experts_implementation("eager")
    batch = pack([[0, 3, 1], [2], [4]], examples) if packed else collate(examples)
    u = random_direction(model)
    with float64_throughout():
        expected = gradient_loop(model, examples)
        group_experts(model)
        found = gradient_pass(model, given([batch]), directions=[u])
    assert_rows([found.rows[0][k] for k in range(len(examples))], u, expected, FLOAT64)
    assert_same_gradients(found.sums, total(expected), FLOAT64)


@pytest.mark.parametrize("architecture", ["mixtral", "gpt-oss"])
def test_experts_are_scored_under_checkpointing(architecture: str) -> None:
    """The same bits, though backward computes the routes, and the taps, again."""
    model, batch = make(architecture), collate(make_examples())
    u, found = random_direction(model), []
    for checkpointing in (False, True):
        with scoring_mode(model, checkpointing):
            found.append(gradient_pass(model, given([batch]), directions=[u]))
    plain, checkpointed = found
    assert plain.rows == checkpointed.rows
    assert all(torch.equal(plain.sums[name], checkpointed.sums[name]) for name in u)


@pytest.mark.parametrize("architecture", ["mixtral", "gpt-oss"])
def test_the_fast_tap_equals_the_general_one(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward-mode differentiation of grouped experts gives the same rows."""
    model, batch = make(architecture), collate(make_examples())
    u = random_direction(model)
    fast = gradient_pass(model, given([batch]), directions=[u])
    monkeypatch.setattr("dualsft.matrix.interaction.is_grouped", lambda _: False)
    general = gradient_pass(model, given([batch]), directions=[u])
    assert fast.rows[0] == pytest.approx(general.rows[0], rel=FLOAT64)


def mixture(experts: int) -> Any:
    """Three layers in bfloat16, of widths that torch's kernel takes."""
    torch.manual_seed(0)
    sizes = {**_SIZES, "num_hidden_layers": 3, "num_local_experts": experts, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes)).bfloat16().eval()


def seen_in_a_batch(model: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> HostWaits:
    """What the second batch of a pass asks of an accelerator."""
    seen, u, batch = HostWaits(), random_direction(model), collate(make_examples([12] * 4))
    settle_mask(model)
    monkeypatch.setattr(model_calls, "to_device", seen.moved(model_calls.to_device))
    seen.place([*model.parameters(), *model.buffers(), *u.values()])

    def watch(batches: Iterable[Batch]) -> Iterator[Batch]:
        for k, batch in enumerate(batches):
            if k:
                with seen.counted():
                    yield batch
            else:
                yield batch

    gradient_pass(model, given([batch] * 2), watch, [u], **options)
    monkeypatch.undo()
    return seen


@pytest.mark.skipif(torch.__version__ < "2.11", reason="the kernel on a CPU wants aligned memory before")
@pytest.mark.parametrize("options", [{}, {"columns": False}, {"by_token": True}], ids=["both", "rows", "tokens"])
def test_neither_launches_nor_waits_grow_with_the_experts(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, in which torch multiplies all experts at once; the host waits twice a batch, as for any model."""
    few, many = (mixture(experts) for experts in (4, 16))
    for model in (few, many):
        group_experts(model)
    seen = [seen_in_a_batch(model, monkeypatch, **options) for model in (few, many)]
    assert seen[0].launches == seen[1].launches
    assert seen[1].launches["_grouped_mm"] == 3 * (6 if options.get("columns") is False else 8)
    for of_model in seen:
        assert of_model.waits == {("nonfinite.py", "cpu"): 1, ("readout.py", "cpu"): 1}
    many.set_experts_implementation("eager")
    loop = seen_in_a_batch(many, monkeypatch, **options)
    assert loop.waits.total() > 3 * 16 < loop.launches.total() / 4  # what the counters would tell


def test_another_type_waits_once_for_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the sizes of the experts, which its loops take; nor do these waits grow with the experts."""
    model = mixture(16).float()
    group_experts(model)
    waits = seen_in_a_batch(model, monkeypatch).waits
    assert waits == {("nonfinite.py", "cpu"): 1, ("readout.py", "cpu"): 1, ("grouped.py", "cpu"): 3}
