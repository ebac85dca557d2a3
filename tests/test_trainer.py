from pathlib import Path
from typing import Any

import pytest
import torch

from dualsft import InstructionDataModule, SelectionModule
from dualsft.errors import UserError
from dualsft.sharding.strategy import DDP
from dualsft.trainer import Trainer, _fresh_casts
from tests.world.data import sums, write_jsonl


def test_no_validation_set_is_overwritten(tmp_path: Path) -> None:
    """`select` refuses to overwrite a folder that one of several validation sets lies in."""
    for name in (".unfinished", "logs"):
        (tmp_path / "out" / name).mkdir(parents=True)
    sets = {
        "a": write_jsonl(tmp_path / "a.jsonl", sums(2)),
        "b": write_jsonl(tmp_path / "out" / "logs" / "b.jsonl", sums(2)),
    }
    run = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    data = InstructionDataModule(sets["a"], sets, tokenizer="x")
    with pytest.raises(UserError, match=r"--overwrite would delete .*b\.jsonl"):
        run.select(SelectionModule("x"), data, str(tmp_path / "out"), overwrite=True)
    assert Path(sets["b"]).is_file()


def test_a_change_of_weights_shows_under_autocast() -> None:
    """Within one autocast context, a weight that was changed after its first use is cast anew."""
    linear = torch.nn.Linear(2, 2, bias=False)
    ones = torch.ones(1, 2)
    with torch.autocast("cpu", torch.bfloat16), _fresh_casts(torch.device("cpu")):
        before = linear(ones).detach()
        with torch.no_grad():
            linear.weight.add_(1.0)
        after = linear(ones).detach()
    torch.testing.assert_close(after - before, torch.full((1, 2), 2.0, dtype=torch.bfloat16), rtol=0.0, atol=0.05)


def test_nothing_is_cast_where_autocast_is_off() -> None:
    """Without autocast the context changes nothing."""
    with _fresh_casts(torch.device("cpu")):
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.float32


def test_the_name_ddp_is_our_own_strategy() -> None:
    """Lightning's, which auto takes for several devices, is refused."""
    quiet: dict[str, Any] = {"accelerator": "cpu", "devices": 2, "logger": False, "enable_checkpointing": False}
    assert isinstance(Trainer(strategy="ddp", **quiet).strategy, DDP)
    run = Trainer(**quiet)
    with pytest.raises(UserError, match=r"set trainer\.strategy to ddp, which .* to fsdp2 or hsdp"):
        run.select(SelectionModule("x"), InstructionDataModule("x", "y", tokenizer="x"), "out")
