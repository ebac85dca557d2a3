"""What scores predict for variants, against autograd, and the selections that the predictions are made from."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dualsft.cli import run
from dualsft.commands.audit_scores import ScoreJobs, own_scorer, select_config
from dualsft.commands.experiment_worker import execute, explain
from dualsft.errors import UserError
from dualsft.experiments.audit_plan import AuditOptions, Sizes, Variation, variations
from dualsft.experiments.bank import Bank, do
from dualsft.experiments.draws import mixture
from dualsft.experiments.predictions import predicted_gains
from dualsft.experiments.variants import examples_of, make_variant, weights_of
from dualsft.models.loading import load_model
from dualsft.objectives import example_losses
from dualsft.selection import Selection, load_selection
from tests.world.jobs import MAX_LENGTH, Inputs, write_inputs, write_job

STEP = 1e-3


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A tiny model, a pool of its usual rows, and a validation set."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def audited(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Selection:
    """A selection of a third of the examples and a fifth of the weights, by plain gradients at the base model."""
    folder = tmp_path_factory.mktemp("audited")
    model = {
        "preconditioner": "none",
        "warmup": {"fraction": 0.0},
        "parameter_budget": 0.2,
        "data_budget": 3,
        "step_size": STEP,
        "dtype": "float32",
        "frozen": ["norm"],
    }
    data = {"train": inputs.train, "validation": inputs.validation, "max_length": MAX_LENGTH}
    job = write_job(folder, inputs, model={"model_name_or_path": inputs.model, **model}, data=data)
    run(["select", "--config", str(job), "--output_dir", str(folder / "selection")])
    return load_selection(folder / "selection")


def drawn(audited: Selection) -> list[Variation]:
    """A few variants of each family and side."""
    counts = audited.about.counts
    names = {name: part.numel() for name, part in audited.stored_masks().items() if "norm" not in name}
    pool = audited.examples["status"].to_pylist().count("ok")
    sizes = Sizes(pool, counts.examples.selected, sum(names.values()), counts.parameters.selected)
    return variations(sizes, AuditOptions(runs=4, bands=3, pairs=3))


def gradient(inputs: Inputs, ids: list[int] | None) -> dict[str, Tensor]:
    """The gradient of the mean loss over these examples of the pool, or over the validation set."""
    model, data = load_model(inputs.model, "float32").double().eval(), inputs.data()
    loader = data.validation_loader() if ids is None else data.pool_loader(ids)
    losses = torch.cat([example_losses(model, batch) for batch in loader])
    losses.mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
def test_predictions_are_those_of_autograd(inputs: Inputs, audited: Selection, tmp_path: Path) -> None:
    """Each variant's predicted gain, per unit of the learning rates' sum, is <v, m ⊙ ḡ_S>, on every side."""
    variants, bank = drawn(audited), Bank(tmp_path)
    jobs = ScoreJobs(audited, None, variants, 1.0)
    for job in jobs.jobs.values():
        do(bank.put(job), execute, explain)
    found = predicted_gains(audited, jobs.scored(bank), variants)
    v, of_examples = gradient(inputs, None), {}
    for one, predicted in zip(variants, found, strict=True):
        ids = examples_of(audited, one.variant["examples"])
        if str(ids) not in of_examples:
            of_examples[str(ids)] = gradient(inputs, ids)
        g, mask = of_examples[str(ids)], weights_of(audited, one.variant["weights"])
        exact = sum(float((v[name] * g[name])[part].sum()) for name, part in mask.items())
        scale = sum(float((v[name] * g[name]).abs().sum()) for name in g)
        assert predicted == pytest.approx(exact, abs=1e-4 * scale), one


def test_variants_differ_from_the_selection_in_their_choice_alone(
    inputs: Inputs, audited: Selection, tmp_path: Path
) -> None:
    """A variant is a selection with the drawn examples and weights, frozen weights never among them."""
    for number, one in enumerate(drawn(audited)):
        made_at = tmp_path / str(number)
        make_variant(str(audited.folder), one.variant, made_at, inputs.train, "train")
        made = load_selection(made_at)
        assert made.example_ids == examples_of(audited, one.variant["examples"])
        assert len(made.records) == len(made.example_ids)
        mask = made.mask()
        assert not any(bool(part.any()) for name, part in mask.items() if "norm" in name)
        assert sum(int(part.sum()) for part in mask.values()) == audited.about.counts.parameters.selected
        assert made.examples["score"].to_pylist() == audited.examples["score"].to_pylist()


def test_scorers_go_by_their_registered_names(audited: Selection, tmp_path: Path) -> None:
    """A selection's own scorer has its registered name; its configuration is that of `select`, through `allocate`."""
    assert own_scorer(audited) == "first_order"
    run(["allocate", str(audited.folder), "--model.data_budget", "2", "--output_dir", str(tmp_path / "fewer")])
    assert select_config(load_selection(tmp_path / "fewer")) == audited.folder / "config.yaml"


@pytest.mark.parametrize(
    ("sizes", "options", "problem"),
    [
        (Sizes(10, 10, 50, 5), {}, "took all of the data"),
        (Sizes(10, 3, 50, 50), {"sides": ["joint"]}, "took all of the parameters"),
    ],
)
def test_a_side_taken_whole_is_not_audited(sizes: Sizes, options: dict[str, list[str]], problem: str) -> None:
    """Where everything was taken there is nothing to compare with."""
    with pytest.raises(UserError, match=problem):
        variations(sizes, AuditOptions(**options))  # type: ignore[arg-type]
    other = ["parameters"] if problem.endswith("data") else ["data"]
    assert variations(sizes, AuditOptions(sides=other))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"runs": -1}, "audit.runs is -1"),
        ({"bands": 1}, "audit.bands is 1"),
        ({"sides": ["both"]}, "'both'; give some of data, parameters, joint"),
        ({"steps": [0]}, "audit.steps has 0"),
        ({"learning_rates": []}, "audit.learning_rates is empty"),
        ({"sizes": [1.0, -0.5]}, "audit.sizes has -0.5"),
    ],
)
def test_options_are_checked(options: dict[str, object], problem: str) -> None:
    """Each is refused in one sentence that names it."""
    with pytest.raises(UserError, match=problem):
        AuditOptions(**options)  # type: ignore[arg-type]


def test_along_a_path_its_own_scores_rank_the_variants(inputs: Inputs, tmp_path: Path) -> None:
    """Nothing is scored anew there: an example's mean score, and the sum over the weights, are the predictions."""
    model = {
        "path": {"along": "target", "epochs": 1, "held_out": 0.0, "learning_rate": 1e-3},
        "warmup": {"fraction": 0.5},
        "data_budget": 3,
    }
    data = {"train": inputs.train, "validation": inputs.validation, "max_length": MAX_LENGTH}
    job = write_job(tmp_path, inputs, model={"model_name_or_path": inputs.model, **model}, data=data)
    run(["select", "--config", str(job), "--output_dir", str(tmp_path / "selection")])
    walked = load_selection(tmp_path / "selection")
    assert own_scorer(walked) == "target"
    variants = drawn(walked)
    jobs = ScoreJobs(walked, None, variants, 1.0)
    assert not jobs.jobs
    found = predicted_gains(walked, jobs.scored(Bank(tmp_path / "bank")), variants)
    scores = dict(enumerate(walked.examples["score"].to_pylist()))
    by_kind = {(one.side, one.label): gain for one, gain in zip(variants, found, strict=True)}
    chosen = [scores[i] for i in walked.example_ids]
    pool = sum(score is not None for score in scores.values())
    assert by_kind["data", "chosen"] == pytest.approx(pool * sum(chosen) / len(chosen))
    mask, weights = walked.mask(), walked.parameter_scores()
    total = sum(float(weights[name][part].sum()) for name, part in mask.items())
    assert by_kind["parameters", "chosen"] == pytest.approx(total, rel=1e-5)
    with pytest.raises(UserError, match="scored along a path, where no scorer takes part"):
        ScoreJobs(walked, "first_order", variants, 1.0)


def test_of_a_large_choice_mixtures_keep_enough() -> None:
    """Where more than half of the weights were chosen, no mixture asks for more others than there are."""
    mask = {"a": torch.arange(100) < 70}
    drawn_weights = [one.variant["weights"] for one in variations(Sizes(10, 3, 100, 70), AuditOptions(pairs=4))]
    shares = sorted({draw["share"] for draw in drawn_weights if draw["rule"] == "mixture"})
    assert len(shares) > 10
    assert all(int(mixture(mask, share, 0)["a"].sum()) == 70 for share in shares)
