"""How often a scoring pass makes the host wait for the accelerator."""

from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from dualsft.data.layout import Batch
from dualsft.matrix import linear_tap, model_calls
from dualsft.matrix.passes import gradient_pass
from dualsft.matrix.sketches import LOSS, Measurement
from dualsft.objectives.inputs import settle_mask
from tests.cases import collate, given, make, make_examples, pack, random_direction
from tests.world.accelerator import HostWaits


def waits_of_second_batch(
    monkeypatch: pytest.MonkeyPatch, batches: list[Batch], architecture: str, **options: Any
) -> HostWaits:
    """Of the second batch of a pass: the first one has a spot check, and finds which module uses which weight."""
    model, seen = make(architecture), HostWaits()
    settle_mask(model)
    monkeypatch.setattr(model_calls, "to_device", seen.moved(model_calls.to_device))
    u = [random_direction(model)] * 2
    seen.place([*model.parameters(), *model.buffers(), *u[0].values()])

    def watch(batches: Iterable[Batch]) -> Iterator[Batch]:
        for k, batch in enumerate(batches):
            if k == 1:
                with seen.counted():
                    yield batch
            else:
                yield batch

    gradient_pass(model, given(batches), watch, u, **options)
    return seen


def padded_or_packed(packed: bool) -> list[Batch]:
    """Two batches."""
    examples = make_examples()
    return [pack([[0, 1], [2, 3, 4]], examples) if packed else collate(examples)] * 2


CASES: dict[str, dict[str, Any]] = {
    "rows and columns": {},
    "rows alone": {"columns": False},
    "by token": {"by_token": True},
    "losses too": {"measurement": Measurement((LOSS,))},
    "sums on the host": {"sums_on_host": True},
}


@pytest.mark.parametrize(
    ("packed", "case", "architecture"),
    [*((packed, case, "llama") for packed in (False, True) for case in CASES), (False, "rows and columns", "gpt2")],
)
def test_a_batch_makes_the_host_wait_twice(
    packed: bool, case: str, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For its losses before backward, and for all else behind it; transformers looks at packed positions."""
    monkeypatch.setattr(linear_tap, "by_gradient_pays", lambda *_: packed)
    seen = waits_of_second_batch(monkeypatch, padded_or_packed(packed), architecture, **CASES[case])
    by_model = {("masking_utils.py", "_local_scalar_dense"): 1} if packed else {}
    assert seen.waits == {("nonfinite.py", "cpu"): 1, ("readout.py", "cpu"): 1, **by_model}
