from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import AdamW

from dualsft.errors import UserError
from dualsft.objectives import example_losses
from dualsft.selection import dense_training
from dualsft.selection.dense_training import BETAS, EPS
from dualsft.selection.offload import Offload
from dualsft.selection.warmup import Warmup, warm_up
from tests.cases import Example, collate, make, make_examples, pack
from tests.references import assert_same_gradients
from tests.world.faults import SHORTAGES, Kind, Shortage, kill_at, poison
from tests.world.jobs import ADAM, Inputs, select


def batches() -> list[Any]:
    """Two batches."""
    examples = make_examples()
    return [collate(examples[:2]), collate(examples[2:])]


@pytest.mark.parametrize("architecture", ["llama tied", "gpt2"])
def test_warm_up_is_adamw_over_all_weights(architecture: str) -> None:
    """Weights and bias-corrected second moment are those of torch's AdamW on the model itself."""
    model, plain = make(architecture), make(architecture)
    for reference in (model, plain):
        for module in reference.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        reference.config.attn_pdrop = 0.0
    moments = warm_up(model, batches(), epochs=2, learning_rate=1e-3)
    plain.train()
    optimizer = AdamW(plain.parameters(), lr=1e-3, betas=BETAS, eps=EPS, weight_decay=0.0)
    for batch in batches() * 2:
        example_losses(plain, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same_gradients(
        {n: p.detach() for n, p in model.named_parameters()},
        {n: p.detach() for n, p in plain.named_parameters()},
        1e-12,
    )
    expected = {n: optimizer.state[p]["exp_avg_sq"] / (1 - BETAS[1] ** 4) for n, p in plain.named_parameters()}
    assert_same_gradients(moments, expected, 1e-12)


def test_the_first_second_moment_is_the_squared_gradient() -> None:
    """After one step the bias correction leaves ĉ = g²."""
    model = make("llama")
    batch = batches()[0]
    found = torch.autograd.grad(example_losses(model, batch).mean(), list(model.parameters()))
    gradients = dict(zip(dict(model.named_parameters()), found, strict=True))
    moments = warm_up(model, [batch], epochs=1, learning_rate=1e-3)
    assert_same_gradients(moments, {name: g.square() for name, g in gradients.items()}, 1e-9)


def test_the_model_is_left_as_it_was_found() -> None:
    """In evaluation mode, without gradients or hooks, every weight still trainable."""
    model = make("llama")
    warm_up(model, batches(), epochs=1, learning_rate=1e-3)
    assert not any(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad and not p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.slow
def test_bfloat16_weights_learn_in_float32() -> None:
    """Many updates far below bfloat16's spacing move the weights all the same."""
    model = make("llama", torch.bfloat16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = warm_up(model, batches(), epochs=40, learning_rate=2.5e-5)
    weight = "model.layers.0.mlp.up_proj.weight"
    large = before[weight].abs() > 0.1
    assert 2.5e-5 < 0.1 * 2**-9
    assert (model.get_parameter(weight) != before[weight])[large].float().mean() > 0.2
    assert all(moment.dtype == torch.float32 for moment in moments.values())


def spoilt(kind: Kind) -> Any:
    """A model whose loss, or gradient, is not finite wherever token 60 occurs."""
    model = make("llama")
    poison(model, 60, kind)
    return model


def some_with(*places: int) -> list[Example]:
    """Five examples, of which those at these places have token 60."""
    clean = [([1 if i == 60 else i for i in ids], labels) for ids, labels in make_examples()]
    return [([60, *ids[1:]], labels) if k in places else (ids, labels) for k, (ids, labels) in enumerate(clean)]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_an_example_that_is_not_finite_is_left_out_alone(
    kind: Kind, packing: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """The step is that of the others, though it spoils its batch or its row, and one line says so."""
    examples = some_with(3)
    others = [example for k, example in enumerate(examples) if k != 3]
    batch = pack([[0, 3, 1], [2, 4]], examples) if packing else collate(examples)
    found, expected = spoilt(kind), spoilt(kind)
    warm_up(found, [batch, collate(others)], epochs=1, learning_rate=1e-3)
    assert f"leaves out the examples [3]: their {kind} is not finite" in capsys.readouterr().err
    warm_up(expected, [collate(others)] * 2, epochs=1, learning_rate=1e-3)
    for (name, weight), other in zip(found.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-5, atol=1e-6, equal_nan=True, msg=name)


def test_a_batch_of_one_bad_example_is_no_step() -> None:
    """The weights and the other steps are as if it were not there."""
    found, expected = spoilt("loss"), spoilt("loss")
    warm_up(found, [collate(some_with(0)[:1]), collate(some_with())], epochs=1, learning_rate=1e-3)
    warm_up(expected, [collate(some_with())], epochs=1, learning_rate=1e-3)
    for weight, other in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=0, atol=0, equal_nan=True)


def test_a_batch_of_which_nothing_is_finite_is_an_error() -> None:
    """The warm-up has run away, or the data are no good: its examples are named, with the ways out."""
    with pytest.raises(UserError, match=r"loss is not finite at the examples \[0, 1\]; .*model\.warmup\.learning_rate"):
        warm_up(spoilt("loss"), [collate(some_with(0, 1)[:2])], epochs=1, learning_rate=1e-3)


def test_a_weight_that_takes_no_part_has_no_second_moment() -> None:
    """It is zero, and the weight stays."""
    model = make("llama")
    model.spare = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    moments = warm_up(model, batches(), epochs=1, learning_rate=1e-3)
    assert torch.equal(moments["spare"], torch.zeros(3, dtype=torch.float64))
    assert torch.equal(model.spare, torch.ones(3, dtype=torch.float64))


class Notebook:
    """A keeper that notes what it is given, and has something to begin with."""

    halved = False

    def __init__(self, kept: Any = None, due: bool = False) -> None:
        self.kept, self._due = kept, due
        self.notes: list[tuple[dict[str, torch.Tensor], dict[str, Any]]] = []

    def load(self) -> Any:
        """What there is to begin with."""
        return self.kept

    def due(self) -> bool:
        """Always or never."""
        return self._due

    def save(self, tensors: dict[str, torch.Tensor], notes: dict[str, Any]) -> None:
        """Keep copies."""
        self.notes.append(({name: value.detach().clone() for name, value in tensors.items()}, notes))

    def halve(self) -> None:
        """Nobody asks."""


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_a_warm_up_goes_on_from_any_step(step: int) -> None:
    """With its dropout, its optimizer's state and its place in the data, to the very same weights and moments."""
    model, notebook = make("gpt2"), Notebook(due=True)
    expected = warm_up(model, batches(), epochs=2, learning_rate=1e-3, keeper=notebook, seed=3)
    assert [(notes["epoch"], notes["done"]) for _, notes in notebook.notes] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    resumed = make("gpt2")
    torch.rand(7)  # whatever else has drawn random numbers
    moments = warm_up(resumed, batches(), 2, 1e-3, keeper=Notebook(notebook.notes[step]), seed=3)
    assert all(torch.equal(moments[name], moment) for name, moment in expected.items())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize(("step", "offload"), [(1, "never"), (2, "always")])
def test_a_fused_optimizer_takes_the_same_steps(step: int, offload: Offload, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, and on the host: weights and moments are torch's own AdamW's, resumed or not."""
    plain, model, resumed, notebook = make("llama"), make("llama"), make("llama"), Notebook(due=True)
    expected = warm_up(plain, batches(), epochs=2, learning_rate=1e-3)
    monkeypatch.setattr(dense_training, "_on_cuda", lambda tensors: True)
    moments = warm_up(model, batches(), epochs=2, learning_rate=1e-3, keeper=notebook, offload=offload)
    assert_same_gradients(moments, expected, 1e-12)
    for weight, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=0, atol=1e-12)
    again = warm_up(resumed, batches(), 2, 1e-3, keeper=Notebook(notebook.notes[step]), offload=offload)
    assert all(torch.equal(again[name], moment) for name, moment in moments.items())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters(), strict=True))


def test_dropout_goes_by_seed_epoch_and_step() -> None:
    """Other seeds drop others, and so does every step; the caller's random numbers are left alone."""
    first = []
    for seed in (0, 0, 1):
        model = make("gpt2")
        state = torch.get_rng_state()
        warm_up(model, batches() * 2, epochs=2, learning_rate=1e-3, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        first.append(model.get_parameter("transformer.wte.weight").detach())
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


@pytest.mark.parametrize(("backward", "offload"), [(False, "never"), (True, "never"), (True, "always")])
@pytest.mark.parametrize("kind", SHORTAGES)
def test_a_shortage_halves_the_batch_but_not_the_step(
    kind: str, backward: bool, offload: Offload, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the step that failed on, each batch goes in two parts; weights and moments are the same up to rounding.

    Gradients that were on their way to the host when backward failed are not added to the retaken step's.
    """
    plain, model, notebook = make("llama"), make("llama"), Notebook()
    expected = warm_up(plain, batches(), epochs=2, learning_rate=1e-3)
    trap = Shortage(SHORTAGES[kind], 2, backward=backward)
    trap.attach(model)
    moments = warm_up(model, batches(), epochs=2, learning_rate=1e-3, keeper=notebook, offload=offload)
    assert trap.runs == 1 + 1 + 3 * 2
    assert_same_gradients(moments, expected, 1e-12)
    for (name, found), reference in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-12, atol=1e-12, msg=name)
    assert [notes for _, notes in notebook.notes] == [{"epoch": 0, "done": 1, "taken": 1, "parts": 2}]
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("dualsft: memory ran out in the warm-up (")
    assert told.endswith("; it goes on in half batches.")


def test_a_second_shortage_stops_the_warm_up() -> None:
    """With advice, and nothing of it stays on the model."""
    model = make("llama")
    Shortage(SHORTAGES["accelerator"], 2, 4, backward=True).attach(model)
    with pytest.raises(UserError, match=r"in the warm-up \(at a request for 2.00 GiB\) with half batches already; "):
        warm_up(model, batches(), epochs=2, learning_rate=1e-3)
    assert not any(module.training for module in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_shortage_in_the_optimizer_is_told_with_advice(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A smaller batch would not help there."""
    kill_at(monkeypatch, AdamW, "step", error=SHORTAGES["accelerator"])
    with pytest.raises(UserError, match=r"in the warm-up \(at a request for 2.00 GiB\); beside the model and a batch"):
        select(inputs, tmp_path / "out", ADAM)
    assert not (tmp_path / "out").exists()


def test_the_draw_is_a_share_in_source_order() -> None:
    """Of ten, 0.3 are three, ascending, of the pool; at least one; all for 1.0; decided by the seed."""
    pool = [3, 5, 8, 13, 21, 34, 55, 89, 144, 233]
    draws = {seed: Warmup(0.3).draw(pool, seed) for seed in range(5)}
    for drawn in draws.values():
        assert len(drawn) == len(set(drawn)) == 3
        assert drawn == sorted(drawn)
        assert set(drawn) <= set(pool)
    assert draws[0] == Warmup(0.3).draw(pool, 0)
    assert len({tuple(drawn) for drawn in draws.values()}) > 1
    assert len(Warmup(0.001).draw(pool, 0)) == 1
    assert Warmup(1.0).draw(pool, 0) == pool


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 1.1}, "fraction is 1.1; give a share from 0"),
        ({"fraction": -0.1}, "fraction is -0.1"),
        ({"fraction": float("nan")}, "fraction is nan"),
        ({"epochs": 0}, "epochs is 0; give at least 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; give a positive number"),
        ({"keep": True, "fraction": 0.0}, "keep is set, but no warm-up is made"),
        ({"keep": True, "checkpoint": "c"}, "keep is set, but no warm-up is made"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    """Key, value and what is allowed are told."""
    with pytest.raises(UserError, match=message):
        Warmup(**options)
