from typing import Any

import pytest
import torch
from torch.optim import AdamW

from dualsft.errors import UserError
from dualsft.objective import example_losses
from dualsft.selection.warmup import BETAS, EPS, Warmup, warm_up
from tests.selection.tiny import assert_same_gradients, collate, make, make_examples


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


def test_bfloat16_weights_learn_in_float32() -> None:
    """Many updates far below bfloat16's spacing move the weights all the same."""
    model = make("llama", torch.bfloat16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = warm_up(model, batches(), epochs=100, learning_rate=1e-5)
    weight = "model.layers.0.mlp.up_proj.weight"
    large = before[weight].abs() > 0.1
    assert 1e-5 < 0.1 * 2**-9
    assert (model.get_parameter(weight) != before[weight])[large].float().mean() > 0.2
    assert all(moment.dtype == torch.float32 for moment in moments.values())


def test_a_loss_that_is_not_finite_names_its_examples() -> None:
    """Only the bad ones are named, with the ways out."""
    model = make("llama")
    examples = [([1 if i == 60 else i for i in ids], labels) for ids, labels in make_examples()]
    examples[3] = ([60, *examples[3][0][1:]], examples[3][1])
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = torch.nan
    with pytest.raises(UserError, match=r"not finite at the examples \[3\]; .*model\.warmup\.learning_rate"):
        warm_up(model, [collate(examples)], epochs=1, learning_rate=1e-3)


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
