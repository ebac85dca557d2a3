import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from lightning import Callback, LightningModule, Trainer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from dualsft.data.records import read_records
from dualsft.errors import UserError
from dualsft.evaluation import EvaluationModule
from dualsft.export.checkpoints import prepare_apply, prepare_extract
from dualsft.export.delta import apply_delta, open_delta
from dualsft.finetune import ExportModel, TrainingPrior
from dualsft.models.loading import load_model, model_fingerprint
from dualsft.selection import load_selection
from tests.world.fits import weights
from tests.world.jobs import Workspace, make_workspace, trainer


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace in which a fit has left its export."""
    workspace = make_workspace(tmp_path_factory.mktemp("exported"), request.param)
    run = trainer(workspace.folder, callbacks=[ExportModel(str(workspace.folder))], enable_checkpointing=False)
    run.fit(workspace.module(training_prior=TrainingPrior(0.1)), datamodule=workspace.data())
    return workspace


def test_export_is_base_plus_delta(exported: Workspace) -> None:
    """Plain transformers loads ``model/``; it has the bits of the base model with the delta applied."""
    found = AutoModelForCausalLM.from_pretrained(exported.folder / "model")
    base = load_model(exported.model)
    apply_delta(exported.folder / "delta.safetensors", base, model_fingerprint(exported.model))
    assert found.dtype == base.dtype
    for (name, tuned), (_, expected) in zip(found.named_parameters(), base.named_parameters(), strict=True):
        assert torch.equal(tuned, expected), name


def test_export_changes_the_selected_weights_alone(exported: Workspace) -> None:
    """Every unselected weight of ``model/`` has the base model's bits, and many a selected one has not."""
    found, base = load_model(str(exported.folder / "model")), load_model(exported.model).state_dict()
    mask = load_selection(exported.selection).mask()
    moved = 0
    for name, tuned in found.named_parameters():
        assert torch.equal(tuned[~mask[name]], base[name][~mask[name]])
        moved += int((tuned != base[name]).sum())
    assert moved > 0.5 * sum(int(chosen.sum()) for chosen in mask.values())


def test_delta_file(exported: Workspace) -> None:
    """`<name>.index` is int64, flat and ascending, `<name>.value` the new values; the metadata names the base.

    Entries are those, and only those, that have changed.
    """
    found = dict(load_model(str(exported.folder / "model")).named_parameters())
    base = dict(load_model(exported.model).named_parameters())
    trained = [name for name, weight in base.items() if not torch.equal(weight, found[name])]
    with safe_open(exported.folder / "delta.safetensors", framework="pt") as stored:
        assert stored.metadata()["base_fingerprint"] == model_fingerprint(exported.model)
        assert sorted(stored.keys()) == sorted(f"{name}.{part}" for name in trained for part in ("index", "value"))
        for name in trained:
            index, value = stored.get_tensor(f"{name}.index"), stored.get_tensor(f"{name}.value")
            assert index.dtype == torch.int64
            assert torch.equal(index, (base[name] != found[name]).flatten().nonzero().squeeze(1))
            assert value.dtype == found[name].dtype
            assert torch.equal(value, found[name].flatten()[index])


def test_export_brings_its_tokenizer(exported: Workspace) -> None:
    """The folder stands alone: its tokenizer is the base model's."""
    found, base = (AutoTokenizer.from_pretrained(path) for path in (exported.folder / "model", exported.model))
    text = "3 + 9? 3 and 9 make #### 12"
    assert found(text)["input_ids"] == base(text)["input_ids"]
    assert not list(exported.folder.glob("*.partial"))
    assert not list(exported.folder.glob("*.old"))


def test_export_keeps_the_base_s_generation_settings(exported: Workspace) -> None:
    """Not one that the library would refuse to write is lost."""
    settings = json.loads((exported.folder / "model" / "generation_config.json").read_text())
    assert settings == json.loads((Path(exported.model) / "generation_config.json").read_text())


def test_extracting_finds_the_fit_s_own_delta(exported: Workspace, folder: Path) -> None:
    """Of base and ``model/`` it is the same entries; what applying gives has the fit's own model card."""
    folder.mkdir()
    prepare_extract(exported.model, str(exported.folder / "model"))(folder)
    found, expected = (load_file(path / "delta.safetensors") for path in (folder, exported.folder))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    prepare_apply(exported.model, str(exported.folder / "delta.safetensors"))(folder)
    assert (folder / "README.md").read_bytes() == (exported.folder / "model" / "README.md").read_bytes()


def test_model_card(exported: Workspace) -> None:
    """It is valid, tells of no folder of this machine, and holds what the record holds, as numbers."""
    card = ModelCard.load(exported.folder / "model" / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.base_model is None  # a folder of this machine is no hub id
    delta = open_delta(exported.folder / "delta.safetensors")
    changed, total = sum(delta.counts.values()), sum(p.numel() for p in load_model(exported.model).parameters())
    assert f"with {changed:,} of its {total:,} weights" in card.text
    train, validation = read_records(exported.train), read_records(exported.validation)
    assert f"training data: train.jsonl, 24 rows, SHA-256 `{train.fingerprint}`" in card.text
    assert "optimizer: AdamW (lr 0.003, betas 0.9, 0.999, eps 1e-08, weight_decay 0.1)" in card.text
    assert "- training prior: weight 0.1, temperature 2.0, confidence max_prob" in card.text
    for line in ("- epochs: 2", "- examples: 17", "- batch tokens: 400", model_fingerprint(exported.model)):
        assert line in card.text
    assert str(exported.folder) not in card.content
    assert str(exported.folder) not in json.dumps(delta.about)
    assert validation.fingerprint not in card.text  # the selection was made with another validation set


class Interrupt(Callback):
    """Presses Ctrl-C in the first batch."""

    def on_train_batch_end(self, *_: object) -> None:
        raise KeyboardInterrupt


def test_interrupted_fit_exports_nothing(workspace: Workspace, folder: Path) -> None:
    """Half-trained weights never look like a result."""
    run = trainer(folder, callbacks=[ExportModel(str(folder)), Interrupt()], enable_checkpointing=False)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run.fit(workspace.module(), datamodule=workspace.data())
    assert not list(folder.glob("*"))


@pytest.mark.parametrize(("again", "renames"), [(False, 0), (False, 1), (True, 0), (True, 1), (True, 2)])
def test_crash_never_leaves_a_half_written_model(
    workspace: Workspace, folder: Path, monkeypatch: pytest.MonkeyPatch, again: bool, renames: int
) -> None:
    """Cut short before any rename, ``model/`` is absent, old or new; the next export mends what is left."""
    module, export, run = workspace.module(), ExportModel(str(folder)), trainer(folder)
    run.fit(module, datamodule=workspace.data())
    old = weights(module)
    if again:
        export.on_fit_end(run, module)
    with torch.no_grad():
        module.compact.masters[0].add_(1.0)
    module.compact.write_back()
    new, rename, left = weights(module), Path.replace, iter(range(renames))

    def crashing(path: Path, target: Path) -> Path:
        if next(left, None) is None:
            raise OSError("crash")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crashing)
        with pytest.raises(OSError, match="crash"):
            export.on_fit_end(run, module)
    if (folder / "model").exists():
        assert holds(folder / "model", old) or holds(folder / "model", new)
    export.on_fit_end(run, module)
    assert holds(folder / "model", new)
    assert sorted(path.name for path in folder.iterdir()) == ["delta.safetensors", "model"]


def holds(folder: Path, expected: dict[str, Tensor]) -> bool:
    """Whether a model folder is whole and has these weights."""
    found = dict(load_model(str(folder)).named_parameters())
    return all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_old_model_is_never_half_deleted(workspace: Workspace, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash while the old export is being removed leaves the new one whole in its place."""
    module, export, run = workspace.module(), ExportModel(str(folder)), trainer(folder)
    run.fit(module, datamodule=workspace.data())
    export.on_fit_end(run, module)
    removed: list[str] = []
    monkeypatch.setattr("shutil.rmtree", lambda path, **_: removed.append(Path(path).name))
    export.on_fit_end(run, module)
    assert "model" not in removed
    assert "model.old" in removed


def test_export_is_for_fine_tuning(workspace: Workspace, folder: Path) -> None:
    """Another module's weights are not exported."""
    module: LightningModule = EvaluationModule(workspace.model)
    run: Trainer = trainer(folder)
    with pytest.raises(UserError, match="not a EvaluationModule"):
        ExportModel(str(folder)).on_fit_end(run, module)
