import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dualsft.cli import run
from dualsft.errors import UserError
from dualsft.models.loading import load_model, model_fingerprint
from dualsft.runs.folder import RunFolder
from tests.commands.test_cli import failure
from tests.world.data import sums
from tests.world.jobs import contents, write_inputs, write_job
from tests.world.models import save_tiny_model


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, and a fit of a selection for it."""
    folder = tmp_path_factory.mktemp("job")
    rows = sums(12)
    config = ["--config", str(write_job(folder, write_inputs(folder, rows, rows)))]
    budgets = ["--model.parameter_budget", "0.1", "--model.data_budget", "6", "--model.warmup.fraction", "0"]
    plain = ["--model.preconditioner", "none", "--output_dir", str(folder / "selection")]
    run(["select", *config, *budgets, *plain])
    fit = ["--model.selection", str(folder / "selection"), "--optimizer", "AdamW", "--optimizer.lr", "0.01"]
    run(["fit", *config, *fit, "--output_dir", str(folder / "fit")])
    return folder


def pair(job: Path) -> list[str]:
    """The options that name the base and the delta."""
    return ["--base", str(job / "model"), "--delta", str(job / "fit" / "delta.safetensors")]


def texts(folder: Path) -> list[str]:
    """What plain transformers writes with a folder's model, tokenizer and generation settings."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer(f"{i} + {i * i}?\n", return_tensors="pt") for i in range(3)]
    return [str(tokenizer.decode(model.generate(**prompt, max_new_tokens=12)[0])) for prompt in prompts]


def test_applied_and_fitted_model_write_the_same_text(job: Path, tmp_path: Path) -> None:
    """Which is another than the base's; config.yaml replays the command."""
    run(["export", "apply", *pair(job), "--output_dir", str(tmp_path / "a")])
    config = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    assert config["base"] == str(job / "model")
    run(["export", "apply", "--config", str(tmp_path / "a" / "config.yaml"), "--output_dir", str(tmp_path / "b")])
    assert texts(tmp_path / "a") == texts(tmp_path / "b") == texts(job / "fit" / "model") != texts(job / "model")


def test_card_tells_what_was_selected_and_how(job: Path) -> None:
    """Budgets, counts, scorer and allocators of the selection, as its manifest has them."""
    text = ModelCard.load(job / "fit" / "model" / "README.md").text
    manifest = json.loads((job / "selection" / "manifest.json").read_text())
    counts, data = manifest["counts"], manifest["data"]
    for line in (
        f"- examples: 6 of 12 ({counts['examples']['scored']} scored)",
        f"- weights: {counts['parameters']['selected']:,} of {counts['parameters']['scored']:,}",
        "- budgets: data 6, weights 0.1",
        "- scorer: `dualsft.scorers.first_order.FirstOrder`",
        "- parameter allocator: `dualsft.allocators.top_k.GlobalTopK` (by magnitude, reverse false)",
        "- preconditioner: none",
        f"- target data: validation.jsonl, 12 rows, SHA-256 `{data['validation']['fingerprint']}`",
        "one matrix M_ij = g_ij u_j scores both",
        "- optimizer: AdamW (lr 0.01",
    ):
        assert line in text


def test_extract_and_revert(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the fit's model the delta again, and with it the base again."""
    checkpoints = ["--base", str(job / "model"), "--model", str(job / "fit" / "model")]
    run(["export", "extract", *checkpoints, "--output_dir", str(tmp_path / "delta")])
    delta = str(tmp_path / "delta" / "delta.safetensors")
    run(["export", "revert", *checkpoints, "--delta", delta, "--output_dir", str(tmp_path / "base")])
    assert model_fingerprint(str(tmp_path / "base")) == model_fingerprint(str(job / "model"))
    assert capsys.readouterr().out.split() == ["wrote", str(tmp_path / "delta"), "wrote", str(tmp_path / "base")]


MISTAKES: dict[str, tuple[list[str], int, str]] = {
    "no form": ([], 1, "its forms are apply, revert, extract, peft"),
    "unknown form": (["aply"], 1, "no form 'aply'; its forms are apply"),
    "no base": (["apply"], 1, "--base is not given"),
    "no delta": (["apply", "--base", "JOB/model"], 1, "--delta is not given"),
    "no delta there": (["apply", "--base", "JOB/model", "--delta", "nowhere"], 1, "nowhere: no such file"),
    "no such base": (
        ["apply", "--base", "./none", "--delta", "JOB/fit/delta.safetensors"],
        1,
        "./none: no such folder",
    ),
    "no delta but a model": (
        ["apply", "--base", "JOB/model", "--delta", "JOB/model/model.safetensors"],
        1,
        "is not a delta",
    ),
    "another base": (
        ["apply", "--base", "JOB/fit/model", "--delta", "JOB/fit/delta.safetensors"],
        1,
        "belongs to base",
    ),
    "unknown option": (["apply", "--scale", "2"], 2, "--scale"),
    "another form's option": (["apply", "--model", "x"], 2, "--model"),
    "missing configuration": (["apply", "--config", "nowhere.yaml"], 2, "nowhere.yaml"),
    "the base reverted": (
        ["revert", "--base", "JOB/model", "--model", "JOB/other", "--delta", "JOB/fit/delta.safetensors"],
        1,
        "made from another model",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_in_one_sentence(
    mistake: str, job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake is told in one line that names it, and leaves no folder behind."""
    if not (job / "other").exists():
        save_tiny_model(job / "other", seed=1)
    arguments, code, words = MISTAKES[mistake]
    given = [argument.replace("JOB", str(job)) for argument in arguments]
    output = ["--output_dir", str(tmp_path / "out")] if given else []
    found, told = failure(["export", *given, *output], capsys, monkeypatch)
    (line,) = told.strip().splitlines()
    assert (found, line.startswith("dualsft: error: ")) == (code, True)
    assert words in line
    assert not (tmp_path / "out").exists()


def test_a_folder_is_overwritten_only_when_asked(job: Path, tmp_path: Path) -> None:
    """And only if an export wrote it, and it is none that the command reads."""
    command = ["export", "apply", *pair(job), "--output_dir"]
    run([*command, str(tmp_path / "out")])
    with pytest.raises(UserError, match="already holds files"):
        run([*command, str(tmp_path / "out")])
    (tmp_path / "out" / "model.safetensors").write_bytes(b"")
    run([*command, str(tmp_path / "out"), "--overwrite"])
    assert load_model(str(tmp_path / "out"))
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"files that no run of ours wrote \(notes.txt\)"):
        run([*command, str(tmp_path / "out"), "--overwrite"])
    with pytest.raises(UserError, match="choose another --output_dir"):
        run([*command, str(job / "model"), "--overwrite"])
    with pytest.raises(UserError, match="files that no run of ours wrote"):
        run(
            [
                "fit",
                "--model.model_name_or_path",
                str(job / "model"),
                "--output_dir",
                str(tmp_path / "out"),
                "--overwrite",
            ]
        )


@pytest.mark.parametrize("killed", [True, False])
def test_nothing_passes_for_a_result_before_it_is_whole(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    """Cut short before any of the moves into the folder, no configuration is there or, unless killed, no folder."""
    if killed:
        monkeypatch.setattr(RunFolder, "release", lambda _: None)
    command = ["export", "apply", *pair(job), "--output_dir"]
    moves = 0
    while True:
        folder = tmp_path / str(moves)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", failing(Path.replace, iter(range(moves)), folder))
            try:
                run([*command, str(folder)])
                break
            except RuntimeError:
                assert not (folder / "config.json").exists()
                assert killed or not folder.exists()
        if killed and moves == 3:
            run([*command, str(folder), "--overwrite"])
            assert (folder / "config.json").is_file()
        moves += 1
    assert moves > 5


@pytest.fixture
def two(job: Path, tmp_path: Path) -> tuple[list[str], Path, dict[str, bytes], dict[str, bytes]]:
    """A command that overwrites, its folder, with another model in it, and the contents before and after."""
    given = ["--model", str(job / "fit" / "model"), *pair(job)]
    run(["export", "apply", *pair(job), "--output_dir", str(tmp_path / "out" / "model")])
    run(["export", "revert", *given, "--output_dir", str(tmp_path / "new")])
    after, folder = contents(tmp_path / "new"), tmp_path / "out" / "model"
    after["config.yaml"] = after["config.yaml"].replace(str(tmp_path / "new").encode(), str(folder).encode())
    return ["export", "revert", *given, "--output_dir", str(folder), "--overwrite"], folder, contents(folder), after


Two = tuple[list[str], Path, dict[str, bytes], dict[str, bytes]]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "model cannot be written .No space left on device.; choose"),
        (
            SafetensorError("I/O error: no room"),
            "model cannot be written .I/O error: no room.; choose another --out",
        ),
        (KeyboardInterrupt(), "The export was interrupted; run it again"),
    ],
)
def test_a_result_stays_if_another_cannot_be_written(
    two: Two, error: BaseException, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk or an interruption on the way leaves the old files as they were and nothing beside them."""
    command, folder, before, after = two
    assert before["model.safetensors"] != after["model.safetensors"]

    def stopping(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("dualsft.export.checkpoints.copy_companions", stopping)  # once the weights are there
        with pytest.raises(UserError, match=words):
            run(command)
    assert contents(folder.parent) == {f"model/{name}": data for name, data in before.items()}
    run(command)
    assert contents(folder) == after
    assert os.listdir(folder.parent) == ["model"]


def test_a_kill_while_another_result_is_written(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a chance to tidy up the old files are as they were; the next try leaves nothing of the first."""
    command, folder, before, after = two
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "release", lambda _: None)
        patch.setattr("dualsft.export.checkpoints.copy_companions", crash)
        with pytest.raises(RuntimeError):
            run(command)
    assert contents(folder) == before
    assert (folder.parent / ".model.partial" / ".unfinished" / "staging" / "model.safetensors").is_file()
    run(command)
    assert contents(folder) == after
    assert os.listdir(folder.parent) == ["model"]


def crash(*_: object) -> None:
    """Stands for the end of the process."""
    raise RuntimeError("crash")


def test_a_kill_while_results_are_exchanged_loses_neither(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut short before any move into the folder, all new files are in it or beside it, and the command starts anew."""
    command, folder, before, after = two
    moves = 0
    while True:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", failing(Path.replace, iter(range(moves)), folder))
            try:
                run(command)
                break
            except RuntimeError:
                staged = contents(folder.parent / ".model.partial" / ".unfinished" / "staging")
                assert after.items() <= {**contents(folder), **staged}.items()
                assert len(staged) == len(after) - moves
        run(command)
        assert contents(folder.parent) == {f"model/{name}": data for name, data in after.items()}
        run([*command[:1], "apply", *command[4:]])
        assert contents(folder) == before
        moves += 1
    assert moves == len(after)
    assert contents(folder.parent) == {f"model/{name}": data for name, data in after.items()}


def test_a_drive_of_its_own_is_not_replaced(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be written next to it on the same drive; it is left as it was. A link is followed."""
    command, folder, before, after = two
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "ismount", lambda path: path == folder)
        with pytest.raises(UserError, match=r"/model is where a drive is mounted.*; give --output_dir a folder in it"):
            run(command)
    assert contents(folder) == before
    link = folder.parent / "link"
    link.symlink_to(folder)
    run([str(link) if part == str(folder) else part for part in command])
    assert link.is_symlink()
    assert contents(folder)["model.safetensors"] == after["model.safetensors"]


def failing(replace: object, left: Iterator[int], folder: Path) -> object:
    """`Path.replace` that stops working after so many moves into a folder; what seals it is one of them."""

    def moved(path: Path, target: Path) -> Path:
        if Path(target).parent == folder and not Path(target).name.startswith(".") and next(left, None) is None:
            raise RuntimeError("crash")
        return replace(path, target)  # type: ignore[operator]

    return moved


def test_every_option_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    """Of each form, and of the command a word on each form."""
    for arguments, words in (
        ([], ("Two checkpoints of one model", "PEFT adapter", "back to the base model")),
        (["revert"], ("The tuned model", "The base model", "The delta.safetensors", "Folder that", "Replace what")),
    ):
        with pytest.raises(SystemExit) as stop:
            run(["export", *arguments, "--help"])
        assert not stop.value.code
        told = " ".join(capsys.readouterr().out.split())
        assert all(word in told for word in words)


def test_peft_adapter_holds_the_change(job: Path, tmp_path: Path) -> None:
    """Positions and differences, filled up with zeros to r (m + n), and modules stored whole: the tuned weights again.

    The adapter is read by the rules of the format, in float64.
    """
    run(["export", "peft", *pair(job), "--output_dir", str(tmp_path / "adapter")])
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    base, tuned = load_model(str(job / "model")), load_model(str(job / "fit" / "model"))
    for name, weight in tuned.named_parameters(remove_duplicate=False):
        module, _, leaf = name.rpartition(".")
        old = base.get_parameter(name).detach().double()
        if module in settings["target_modules"]:
            places, values = (stored[f"base_model.model.{module}.shira_{part}"] for part in ("indices", "weight"))
            assert len(values) == settings["r"] * sum(old.shape)
            assert len({*map(tuple, places.T.tolist())}) == len(values)
            for (row, column), value in zip(places.T.tolist(), values.tolist(), strict=True):
                old[row, column] += value
            torch.testing.assert_close(old, weight.detach().double(), rtol=0, atol=1e-7)
        elif module in (settings["modules_to_save"] or []):
            assert torch.equal(stored[f"base_model.model.{module}.{leaf}"], weight)
        else:
            assert torch.equal(old.float(), weight), name
    assert settings["target_modules"]
    assert "here as an adapter for PEFT" in ModelCard.load(tmp_path / "adapter" / "README.md").text


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_peft_loads_the_adapter(job: Path, tmp_path: Path) -> None:
    """Onto the base it gives the tuned model's logits, up to float32 rounding; the base's own are far from them."""
    peft = pytest.importorskip("peft")
    run(["export", "peft", *pair(job), "--output_dir", str(tmp_path / "adapter")])
    ids = torch.randint(5, 300, (2, 30), generator=torch.Generator().manual_seed(0))
    tuned, base = (load_model(str(job / name)).eval() for name in ("fit/model", "model"))
    with torch.no_grad():
        expected, before = tuned(input_ids=ids).logits, base(input_ids=ids).logits
        found = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(input_ids=ids).logits
    assert (before - expected).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
