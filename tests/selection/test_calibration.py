"""The break-even of a card: measured once, kept, and what happens where nothing can be kept."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dualsft.matrix import linear_tap
from dualsft.matrix.calibration import Ways, measured_break_even
from dualsft.matrix.linear_tap import BreakEven, by_gradient_pays
from dualsft.selection import calibration
from dualsft.selection.calibration import calibrate

MEASURED = BreakEven(100.0, 1e6)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The measurements that are made, of a card that only seems to be there."""
    made: list[Any] = []

    def measure(*what: Any) -> BreakEven:
        made.append(what)
        return MEASURED

    monkeypatch.setattr(linear_tap, "_BREAK_EVEN", dict(linear_tap._BREAK_EVEN))
    monkeypatch.setattr(calibration, "compute_device", lambda _: torch.device("cuda", 0))
    monkeypatch.setattr(calibration, "compute_dtype", lambda _: torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Card 80/GB")
    monkeypatch.setattr(calibration, "measured_break_even", measure)
    return made


def test_a_card_is_measured_once(measured: list[Any], tmp_path: Path) -> None:
    """What it gave decides for each layer, in later runs too; a damaged file is measured again."""
    model: Any = None
    assert not by_gradient_pays(512, 4096**2, "cuda")
    for _ in range(2):
        calibrate(model, str(tmp_path))
    assert measured == [(torch.device("cuda", 0), torch.bfloat16)]
    assert by_gradient_pays(512, 4096**2, "cuda")
    assert not by_gradient_pays(512, 2000, "cuda")
    (kept,) = tmp_path.rglob("*.json")
    for damage in ("{", "[]", '{"tokens": -1.0, "calls": 0.0}', '{"tokens": NaN, "calls": 0.0}'):
        kept.write_text(damage)
        calibrate(model, str(tmp_path))
    assert len(measured) == 5
    assert calibration._kept(kept) == MEASURED


@pytest.mark.parametrize("spoilt", [None, torch.OutOfMemoryError()])
def test_what_tells_nothing_is_not_kept(
    measured: list[Any],
    spoilt: BaseException | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As where other work is on the card, or its memory is short: the next run measures again."""

    def fail(*_: Any) -> None:
        if spoilt is not None:
            raise spoilt

    model: Any = None
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "measured_break_even", fail)
        calibrate(model, str(tmp_path))
    assert "estimated, not measured" in capsys.readouterr().err
    assert not by_gradient_pays(512, 4096**2, "cuda")
    calibrate(model, str(tmp_path))
    assert len(measured) == 1


def test_where_nothing_is_kept_the_estimate_stays(
    measured: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a resumed run would measure otherwise; what follows is told."""
    model: Any = None
    (tmp_path / "file").write_text("")
    calibrate(model, str(tmp_path / "file"))
    assert not measured
    assert not by_gradient_pays(512, 4096**2, "cuda")
    assert "cannot be used as a cache" in capsys.readouterr().err


def test_a_cpu_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its constants are those that were measured on one, so that every machine rounds alike."""
    monkeypatch.setattr(calibration, "compute_device", lambda _: torch.device("cpu"))
    monkeypatch.setattr(calibration, "compute_dtype", lambda _: torch.float32)
    monkeypatch.setattr(calibration, "measured_break_even", None)
    model: Any = None
    calibrate(model, "/dev/null/nowhere")


def test_the_constants_are_those_of_the_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a device on which one way costs 300 tokens' products and the calls those of 2 million weights, per example."""

    def both_ways(_: Any, __: Any, shape: tuple[int, int], length: int, examples: int, rounds: int) -> Ways:
        weights, tokens = shape[0] * shape[1], length * examples
        return Ways(1.0, 1.0 + examples * (300 * weights + 2e6), 1.0 + tokens * weights)

    with monkeypatch.context() as patch:
        patch.setattr("dualsft.matrix.calibration.both_ways", both_ways)
        assert measured_break_even(torch.device("cuda"), torch.bfloat16) == pytest.approx((300, 2e6))
    assert not Ways(1.0, 1.5, 1.05).are_sound
    for _ in range(20):  # the times of such small layers may tell nothing
        if found := measured_break_even(torch.device("cpu"), torch.float32, (64, 64), (16, 16), length=64, examples=4):
            break
    assert found is not None
    assert all(0 <= part < float("inf") for part in found)
