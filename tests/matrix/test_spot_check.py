from typing import Any

import pytest
import torch
from torch import nn

from dualsft.data.layout import Batch
from dualsft.data.packing import collate_packed
from dualsft.errors import UserError
from dualsft.matrix.passes import gradient_pass
from dualsft.matrix.spot_check import check_packing
from tests.cases import collate, given, make, make_examples, pack, random_direction


def packed(lengths: tuple[int, ...] = (9, 4, 13, 5)) -> Batch:
    """All examples in one row."""
    rows = [
        {"example_id": k, "input_ids": ids, "labels": labels} for k, (ids, labels) in enumerate(make_examples(lengths))
    ]
    return dict(collate_packed([rows], pad_token_id=0))


def forgetful(model: Any) -> Any:
    """The model, deaf to position ids: a packed row is one long text to it."""
    model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "position_ids": None}), with_kwargs=True, prepend=True
    )
    return model


def mixing(model: Any) -> Any:
    """The model with a layer that adds the batch's mean to each example."""
    model.model.layers[0].mlp.register_forward_hook(lambda _, args, output: output + output.mean(0, keepdim=True))
    return model


@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_model_that_mixes_examples_is_refused(columns: bool, dtype: torch.dtype) -> None:
    """Rows that depend on the company are found on the first batch, and named with the example and both numbers."""
    model = mixing(make("llama", dtype))
    with pytest.raises(UserError, match=r"LlamaForCausalLM cannot be scored in batches: example 0 scores .* alone"):
        gradient_pass(model, given([collate(make_examples())]), directions=[random_direction(model)], columns=columns)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_weight_that_cannot_be_followed_is_found_before_the_second_batch() -> None:
    """A parameter that a closure holds on to has no derivative that a module could give; the first batch shows it."""
    model = make("llama")
    model.model.holder = nn.LayerNorm(16, dtype=torch.float64)
    held = model.model.holder.weight
    model.model.layers[0].register_forward_hook(lambda _, args, output: output * held)
    seen: list[int] = []

    def watch(batches: Any) -> Any:
        for batch in batches:
            seen.append(1)
            yield batch

    batches = given([collate(make_examples()), collate(make_examples(seed=3))])
    with pytest.raises(UserError, match=r"example 0 scores .* alone .*past the module that owns it"):
        gradient_pass(model, batches, watch, [random_direction(model)])
    assert seen == [1]


@pytest.mark.parametrize("architecture", ["llama tied", "gpt2", "gemma3", "mixtral"])
def test_models_that_keep_packed_examples_apart_pass(architecture: str) -> None:
    """Position ids that restart keep packed examples apart, sliding windows and learned positions included."""
    model = make(architecture)
    check_packing(model, packed(), torch.float64)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_a_model_that_lets_packed_examples_see_one_another_is_refused() -> None:
    """It is named, with an example and its two losses, and with what to do."""
    model = forgetful(make("llama")).train()
    with pytest.raises(
        UserError, match=r"LlamaForCausalLM lets packed examples see .*example 3 .*alone; do not pack examples"
    ):
        check_packing(model, packed(), torch.float64)
    check_packing(model.train(), collate(make_examples()), torch.float64)
    assert model.training


def test_a_spoilt_neighbour_is_not_taken_for_mixing() -> None:
    """A NaN loss spoils its row; the examples beside it are left to the pass, which leaves the bad one out."""
    model, batch = make("llama"), packed()
    token = int(batch["input_ids"][0, 0])
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = torch.inf
    check_packing(model, batch, torch.float64)


def test_a_pass_over_packed_rows_of_a_forgetful_model_is_refused() -> None:
    """The spot check alone, without `check_packing`, also refuses, and says not to pack."""
    model = forgetful(make("llama"))
    with pytest.raises(UserError, match=r"cannot be scored in batches.*; do not pack examples"):
        gradient_pass(model, given([packed()]), directions=[random_direction(model)])


@pytest.mark.parametrize("rows", [[[[0], [1, 2], [3]]], [[[0], [3]], [[1, 2]]]], ids=["inside", "later"])
def test_mixing_is_found_wherever_the_first_shared_row_is(rows: list[list[list[int]]]) -> None:
    """Between examples with rows of their own, or in a later batch than those, which come first."""
    examples = make_examples((16, 7, 9, 15))
    model = forgetful(make("llama"))
    with pytest.raises(UserError, match=r"cannot be scored in batches.*; do not pack examples"):
        gradient_pass(model, given([pack(part, examples) for part in rows]), directions=[random_direction(model)])


def test_the_first_of_a_row_is_not_asked_alone() -> None:
    """It sees nothing of those behind it, so a row of their losses tells."""
    with pytest.raises(UserError, match=r"lets packed examples see .*example 2 "):
        check_packing(forgetful(make("llama")), pack([[0, 1, 2], [3]], make_examples((9, 4, 5, 13))), torch.float64)
