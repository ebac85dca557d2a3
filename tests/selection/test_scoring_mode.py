import pytest

from dualsft.matrix.passes import gradient_pass
from dualsft.selection.passes import scoring_mode
from tests.cases import collate, given, make, make_examples, random_direction
from tests.references import assert_same_gradients, gradient_loop, inner, total


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_checkpointing_does_not_bring_dropout_back(architecture: str) -> None:
    """A model that drops out by its layers' training flags scores without dropout, recomputing activations or not."""
    model, examples = make(architecture), make_examples()
    assert max(getattr(model.config, name, 0.0) for name in ("attn_pdrop", "dropout")) > 0
    u, gradients = random_direction(model), gradient_loop(model, examples)
    with scoring_mode(model, checkpointing=True):
        found = gradient_pass(model, given([collate(examples)]), directions=[u])
    assert list(found.rows[0].values()) == pytest.approx([inner(u, g) for g in gradients], rel=1e-9)
    assert_same_gradients(found.sums, total(gradients), 1e-11)


@pytest.mark.parametrize(("checkpointing", "calls_per_batch"), [(False, 1), (True, 2)])
def test_checkpointing_recomputes(checkpointing: bool, calls_per_batch: int) -> None:
    """Inside, each block runs a second time for the backward pass if, and only if, that was asked for."""
    model, calls = make("gpt2"), []
    model.get_submodule("transformer.h.0.mlp").register_forward_pre_hook(lambda *_: calls.append(1))
    with scoring_mode(model, checkpointing):
        gradient_pass(model, given([collate(make_examples())]))
    assert len(calls) == calls_per_batch


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_mode_ends_in_evaluation(checkpointing: bool) -> None:
    """Whatever happens inside, no module is left in training."""
    model = make("gpt2").train()

    def fail() -> None:
        with scoring_mode(model, checkpointing):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not any(module.training for module in model.modules())
