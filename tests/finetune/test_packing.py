"""Fine-tuning on packed rows."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from dualsft.data.layout import one_example
from dualsft.errors import UserError
from dualsft.models.loading import load_model
from dualsft.objectives import example_losses
from tests.world.fits import weights
from tests.world.jobs import Workspace, adamw, trainer


def test_a_packed_fit_equals_a_loop_over_single_examples(workspace: Workspace, folder: Path) -> None:
    """The step of a packed batch is that of its examples' mean loss, each computed alone and unpadded."""
    data = workspace.data(packing=True)
    model = load_model(workspace.model, "float64")
    optimizer = adamw(model.parameters())
    loader = data.train_dataloader()
    assert max(len(batch["example_id"]) for batch in loader) > 1
    for batch in loader:
        examples = range(len(batch["example_id"]))
        torch.stack([example_losses(model, one_example(batch, k))[0] for k in examples]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    module = workspace.module(dtype="float64", selection=None)
    trainer(folder, max_epochs=1).fit(module, datamodule=workspace.data(packing=True))
    expected = {name: weight.detach() for name, weight in model.named_parameters()}
    for name, weight in weights(module).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-8)


def test_a_model_that_mixes_packed_examples_is_refused(
    workspace: Workspace, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step says so, before any weight has changed."""
    forward = LlamaForCausalLM.forward
    deaf = lambda *args, position_ids=None, **kwargs: forward(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(LlamaForCausalLM, "forward", deaf)
    module = workspace.module()
    with pytest.raises(UserError, match=r"lets packed examples see one another.*; set data.packing to false"):
        trainer(folder).fit(module, datamodule=workspace.data(packing=True))
    before = dict(load_model(workspace.model).named_parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in weights(module).items())
