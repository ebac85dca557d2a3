from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from dualsft.errors import UserError
from dualsft.finetune import MaskedFinetuneModule
from dualsft.models.loading import checkpoint_activations
from dualsft.objectives import example_losses
from dualsft.training import compilation
from dualsft.training.compact import CompactParameters
from dualsft.training.compilation import check_compiler, compile_blocks
from tests.world.data import random_batch, random_mask
from tests.world.jobs import SGD, make_workspace, select, trainer
from tests.world.models import tiny_llama

# torch's own, when it traces checkpoints and autograd functions
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces blocks as they are compiled, and runs what comes out as it stands: that takes seconds, not minutes."""
    monkeypatch.setattr(compilation, "_BACKEND", "eager")
    torch.compiler.reset()


def train(compiled: bool) -> tuple[list[float], list[Tensor]]:
    """The losses and masters of two steps, on batches of two shapes."""
    model = tiny_llama(noise=0.02, num_hidden_layers=1).train()
    checkpoint_activations(model)
    if compiled:
        compile_blocks(model)
    mask = {name: chosen[..., :1].expand(chosen.shape) for name, chosen in random_mask(model, 0.3).items()}
    compact = CompactParameters(model, mask)
    compact.attach()
    optimizer = torch.optim.SGD(compact.parameters(), lr=0.1)
    compact.write_back_after(optimizer)
    losses = []
    for step, rows in enumerate((3, 1)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = example_losses(model, random_batch(rows, 9 + step, seed=step)).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [master.detach() for master in compact.masters]


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
def test_compiled_training_is_eager_training() -> None:
    """Losses and masters of whole rows are equal to the bit, recomputed under autocast; nothing is left out."""
    expected = train(compiled=False)
    counters.clear()
    found = train(compiled=True)
    assert found[0] == expected[0]
    assert all(torch.equal(one, other) for one, other in zip(found[1], expected[1], strict=True))
    assert counters["stats"]["unique_graphs"]
    assert not counters["graph_break"]


@pytest.mark.slow
def test_a_model_that_its_user_compiles() -> None:
    """Compiled after the hooks of whole rows are there, they are compiled too, and the masters' gradients the same."""

    def gradients(compiled: bool) -> list[Tensor | None]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))
        rows = {name: torch.arange(len(p)).view(-1, *[1] * (p.dim() - 1)) < 3 for name, p in model.named_parameters()}
        masks = {name: rows[name].expand(p.shape).contiguous() for name, p in model.named_parameters()}
        compact = CompactParameters(model, masks)
        compact.attach()
        call: Any = torch.compile(model, backend="aot_eager") if compiled else model
        call(torch.ones(5, 8)).square().sum().backward()
        return [master.grad for master in compact.masters]

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
def test_select_and_fit_compile(tmp_path: Path) -> None:
    """Both give what they give without: scores by a compiled validation gradient, and the masters of a fit."""
    workspace = make_workspace(tmp_path)
    one, other = (select(workspace, tmp_path / str(on), {**SGD, "compile": on}) for on in (False, True))
    assert one.examples.equals(other.examples)
    modules = [workspace.module(compile=on) for on in (False, True)]
    counters.clear()
    for module in modules:
        run = trainer(max_epochs=1, limit_train_batches=2)
        run.fit(module, datamodule=workspace.data(validation=None))
    assert counters["stats"]["unique_graphs"]
    for expected, found in zip(*(module.compact.masters for module in modules), strict=True):
        assert torch.equal(found, expected)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A platform on which torch cannot compile is told in one sentence, before anything is loaded."""

    def fails(*_: Any) -> None:
        raise RuntimeError("no C++ compiler\nand much more")

    monkeypatch.setattr(compilation, "_BACKEND", fails)
    with pytest.raises(
        UserError, match=r"^torch cannot compile for cpu here \(.*no C\+\+.*\); install .*do not compile"
    ):
        check_compiler(torch.device("cpu"))
    module = MaskedFinetuneModule("nowhere", compile=True)
    module.trainer = trainer()
    with pytest.raises(UserError, match=r"or set model\.compile to false\.$"):
        module.setup("fit")
    with pytest.raises(UserError, match="Linear has no list of layers"):
        compile_blocks(nn.Linear(2, 2))
