"""How many operations a scoring pass launches for a batch, beside a plain pass."""

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dualsft.data.layout import Batch, to_device
from dualsft.matrix import model_calls
from dualsft.matrix.passes import gradient_pass
from dualsft.objectives import example_losses
from dualsft.objectives.inputs import settle_mask
from tests.cases import collate, given, make_examples, pack, random_direction
from tests.world.accelerator import HostWaits

CPU = torch.device("cpu")
PADDED = collate(make_examples([12] * 4))
PACKED = pack([[0, 1], [2, 3]], make_examples([12] * 4))


def deep() -> Any:
    """Ten layers in bfloat16: launches outside of them hardly count."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=10, tie_word_embeddings=False)).bfloat16().eval()
    settle_mask(model)
    return model


def plain(model: Any, batch: Batch) -> int:
    """Launches of losses and their gradients."""
    seen = HostWaits()
    seen.place([*model.parameters(), *model.buffers()])
    placed = seen.moved(to_device)(batch, CPU)
    with seen.counted():
        example_losses(model, placed).sum().backward()
    return seen.launches.total()


def scoring(model: Any, batch: Batch, monkeypatch: pytest.MonkeyPatch, **options: Any) -> int:
    """Launches of the second batch of a pass; the first one finds out what holds for all."""
    seen, u = HostWaits(), {name: part.bfloat16() for name, part in random_direction(model).items()}
    monkeypatch.setattr(model_calls, "to_device", seen.moved(to_device))
    seen.place([*model.parameters(), *model.buffers(), *u.values()])

    def watch(batches: Iterable[Batch]) -> Iterator[Batch]:
        first, second = batches
        yield first
        with seen.counted():
            yield second

    gradient_pass(model, given([batch] * 2), watch, [u], **options)
    return seen.launches.total()


@pytest.mark.parametrize("batch", [PADDED, PACKED], ids=["padded", "packed"])
@pytest.mark.parametrize(("options", "most"), [({}, 1.45), ({"columns": False}, 1.3)], ids=["both", "rows"])
def test_launches_beside_a_plain_pass(batch: Batch, options: Any, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A linear layer adds its product with u, that with its input, and their sum; so does a norm, by its output.

    On a CPU a product in bfloat16 is cast besides, which a GPU is spared.
    """
    assert scoring(deep(), batch, monkeypatch, **options) <= most * plain(deep(), batch)
