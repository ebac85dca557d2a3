"""Jobs as a worker does them, in this process."""

import gc
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dualsft.commands.experiment_jobs import Jobs
from dualsft.commands.experiment_worker import execute
from dualsft.commands.shared_scores import choice_of
from dualsft.experiments.bank import Bank, Result
from dualsft.experiments.jobs import Job
from dualsft.finetune.adapter import with_rank
from dualsft.selection import load_selection
from tests.world.data import sums
from tests.world.jobs import Inputs, write_inputs, write_job

CHOICE = ("examples.parquet", "mask.safetensors", "selected.jsonl")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A tiny model, 24 rows of pool and a validation set."""
    rows = sums(30)
    return write_inputs(tmp_path_factory.mktemp("inputs"), rows[:24], rows[24:])


@pytest.fixture(scope="module")
def jobs(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """What makes jobs of them."""
    model = {"model_name_or_path": inputs.model, "samples": {"number": 0}, "parameter_budget": 0.2, "data_budget": 6}
    model["warmup"] = {"fraction": 0.5, "learning_rate": 1e-3}
    optimizer = {"class_path": "AdamW", "init_args": {"lr": 1e-2}}
    written = write_job(
        tmp_path_factory.mktemp("job"), inputs, model=model, optimizer=optimizer, data={"batch_size": 4}
    )
    return Jobs(["--config", str(written)])


def done(job: Job, bank: Bank) -> Result:
    """A job's result."""
    return execute(job, bank.put(job))


def test_a_checkpoint_is_known_by_its_second_moment_too(jobs: Jobs, inputs: Inputs, tmp_path: Path) -> None:
    """A job whose preconditioner comes from another second moment is another job, though the weights are the same."""
    ready = shutil.copytree(inputs.model, tmp_path / "ready")

    def key() -> str:
        return jobs.select("ready", {"model.warmup": {"fraction": 0, "checkpoint": str(ready)}}).key

    bare = key()
    keys = [bare, bare]
    for number, value in enumerate((1.0, 2.0)):
        save_file({"moment": torch.tensor([value])}, ready / "second_moment.safetensors")
        keys[number] = key()
    assert len({bare, *keys}) == 3


@pytest.mark.slow
def test_an_allocation_is_the_selection(jobs: Jobs, tmp_path: Path) -> None:
    """What is allocated from another selection's scores is what a selection of its own would choose; done twice too."""
    bank, other = Bank(tmp_path), {"model.data_budget": 0.5, "model.parameter_allocator": "layer_quota"}
    source, own = jobs.select("source", {}), jobs.select("own", other)
    folder = bank.place(source) / "selection"
    job = jobs.allocate("choice", source, str(folder), choice_of(jobs.settings("select", other)))
    results = [done(of, bank) for of in (source, own, job, job)]
    assert results[1].costs["examples"] == results[2].costs["examples"] == 12
    for name in CHOICE:
        made, expected = (bank.place(of) / "selection" / name for of in (job, own))
        assert made.read_bytes() == expected.read_bytes()


def weights_in_memory() -> int:
    """How many parameters of models there are."""
    return sum(type(found) is torch.nn.Parameter for found in gc.get_objects())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fit", "select"])
def test_nothing_stays_in_memory(kind: str, jobs: Jobs, inputs: Inputs, tmp_path: Path) -> None:
    """A job leaves no weights behind, so that a worker can do any number of them one after another."""
    evaluations = jobs.evaluations({"target": {"data.validation": inputs.validation}})
    job = jobs.select("it", {}) if kind == "select" else jobs.fit("it", {"trainer.max_epochs": 1}, evaluations)
    before = weights_in_memory()
    done(job, Bank(tmp_path))
    assert weights_in_memory() == before


def adapter_job(jobs: Jobs, inputs: Inputs, bank: Bank, config: dict[str, Any]) -> Job:
    """A job that trains an adapter on chosen examples."""
    source = jobs.select("source", {})
    done(source, bank)
    fitted = with_rank(config, inputs.model, 2000, seed=1)
    evaluations = jobs.evaluations({"target": {"data.validation": inputs.validation}})
    return jobs.fit(
        "adapter",
        {"seed_everything": 1, "trainer.max_epochs": 2},
        evaluations,
        selection=str(bank.place(source) / "selection"),
        selection_fingerprint=source.key,
        adapter=fitted,
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # PEFT's SHiRA makes sparse tensors
@pytest.mark.parametrize("kind", ["LORA", "SHIRA"])
def test_an_adapter_is_trained_and_merged(kind: str, jobs: Jobs, inputs: Inputs, tmp_path: Path) -> None:
    """It trains about as many weights as asked for, on the chosen examples, to a checkpoint of the base's own names.

    The same job gives the same weights again, and a lower loss on what it was trained on.
    """
    job = adapter_job(jobs, inputs, Bank(tmp_path / "one"), {"peft_type": kind})
    results = [execute(job, Bank(tmp_path / name).put(job)) for name in ("one", "two")]
    trained = [
        load_file(Bank(tmp_path / name).place(job) / "work" / "fit" / "model" / "model.safetensors")
        for name in ("one", "two")
    ]
    base = load_file(Path(inputs.model) / "model.safetensors")
    assert trained[0].keys() == base.keys()
    assert any((trained[0][name] != base[name]).any() for name in base)
    assert all((trained[0][name] == trained[1][name]).all() for name in base)
    assert results[0].metrics == results[1].metrics
    assert 1000 < results[0].costs["trained_weights"] < 3000
    assert results[0].costs["examples"] == 6
    assert results[0].costs["bytes_on_disk"] > 4 * results[0].costs["trained_weights"]


def test_variants_count_as_the_selection_does(jobs: Jobs, inputs: Inputs, tmp_path: Path) -> None:
    """A random and a lowest choice without counts take as many of each side as the selection chose, and others."""
    from dualsft.experiments.variants import make_variant

    bank, source = Bank(tmp_path / "bank"), jobs.select("source", {})
    done(source, bank)
    chosen = load_selection(bank.place(source) / "selection")
    for k, draw in enumerate(({"rule": "random", "seed": 0}, {"rule": "band", "band": 1, "bands": 2})):
        make_variant(str(chosen.folder), {"examples": draw, "weights": draw}, tmp_path / str(k), inputs.train, "train")  # type: ignore[typeddict-item]
        variant = load_selection(tmp_path / str(k))
        assert variant.about.counts.examples.selected == chosen.about.counts.examples.selected
        assert variant.about.counts.parameters.selected == chosen.about.counts.parameters.selected
        assert variant.example_ids != chosen.example_ids
