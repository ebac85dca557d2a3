"""dualsft beside bergson on the same work: what scoring costs, how exact the scores are, and what removing rows does.

    python -m venv bergson && bergson/bin/pip install torch==2.13.0    a CPU build where there is no GPU
    bergson/bin/pip install --no-deps bergson==2.5.1
    bergson/bin/pip install accelerate datasets jinja2 jaxtyping ml_dtypes natsort numpy scipy peft petname pyarrow \
        pyyaml simple-parsing torchopt "transformers>=5.0" "huggingface-hub>=1.13.0"
    OMP_NUM_THREADS=1 python benchmarks/peers.py --bergson_python bergson/bin/python    about an hour on one core

bergson declares torchvision, torchaudio and bitsandbytes, which nothing here needs. The work is the quick start's: its
model, the first rows of its pool, its validation rows as the target, the same tokens with the responses supervised.
Three tables, also in ``peers.json``; a second start goes on where the first one stopped.

Cost: medians over rounds in which every setting runs once; all of a command counts, start and loading included. The
milliseconds of a row are the difference between the pool and a few rows of it. Agreement: the cosine and Spearman's
correlation with float64 autograd over one example at a time, both over the weights that the tool covers and over all,
with the tool's own loss (the mean or the sum over tokens). Removal: the highest scored rows are taken out of the pool,
the model is trained on the others, and the target's held-out loss is compared with the same seed's without removal.
"""

import argparse
import json
import statistics
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

from peer_exact import ExactScores, cosine, spearman
from peer_removal import Training, drawn, held_out_loss, highest, interval, save_trained
from peer_tools import (
    PROJECTION,
    MiB,
    Setting,
    bergson,
    dualsft,
    ekfac,
    lowered_scores,
    magic,
    products,
    run,
    slug,
    store,
    stored_products,
    trackstar,
    versions,
    written_scores,
)
from peer_work import Work, kept, roomy_copy, write_work
from torch import Tensor

FIRST_ORDER = ("--model.path.along", "null", "--model.scorer", "first_order", "--model.preconditioner", "none")
AT_MODEL = (*FIRST_ORDER, "--model.warmup.fraction", "0")
SHARES = (0.01, 0.1)
PACKAGES = ["torch", "transformers", "datasets"]
RANDOM = "random"
LARGE_BATCH = 4096
"""Tokens of a batch in the quick start's configuration; bergson takes no more than the model has positions."""


@dataclass(frozen=True)
class Peers:
    """Everything that is compared, kept in a folder.

    Attributes:
        folder: Where all of it is written.
        python: The interpreter of bergson's environment.
        options: The command line's.
        training: The retraining.
    """

    folder: Path
    python: Path
    options: argparse.Namespace
    training: Training

    @cached_property
    def work(self) -> Work:
        """The pool, and all that belongs to it."""
        return write_work(self.folder / "work", self.options.rows)

    @cached_property
    def few(self) -> Work:
        """A few rows of it."""
        return write_work(self.folder / "few", self.options.few)

    @cached_property
    def trained(self) -> Work:
        """The same rows for a model trained on all of them, under a seed that no retraining has."""
        model = self.folder / "trained"
        if not (model / "model.safetensors").is_file() or not (self.folder / "trained.json").is_file():
            save_trained(self.work, model, self.training, self.options.seeds)
            kept(self.folder / "trained.json", lambda: self.options.seeds)
        return Work(self.work.folder, model)

    def timed(self) -> list[Setting]:
        """The settings whose cost and agreement are told."""
        theirs = partial(bergson, self.python)
        mean, roomy = partial(products, loss_reduction="mean"), partial(self._roomy, loss_reduction="mean")
        projected, stored = (partial(steps, projection_dim=PROJECTION) for steps in (products, store))
        return [
            theirs("bergson, mean over tokens", mean, written_scores),
            theirs(f"bergson, the same, {LARGE_BATCH:,} tokens a batch", roomy, written_scores),
            theirs("bergson, its defaults", products, written_scores, reduction="sum"),
            theirs("bergson, projected", projected, written_scores, reduction="sum"),
            theirs("bergson, a store, projected", stored, stored_products, reduction="sum"),
            theirs("bergson, EK-FAC", ekfac, written_scores, reduction="sum", is_product=False),
            theirs("bergson, TrackStar", trackstar, written_scores, reduction="sum", is_product=False),
            dualsft("dualsft, first order", *AT_MODEL),
            dualsft("dualsft, the same, 512 tokens a batch", *AT_MODEL, "--data.batch_tokens", "512"),
        ]

    def _roomy(self, work: Work, folder: Path, **options: Any) -> list[dict[str, Any]]:
        model = roomy_copy(work.model, self.folder / "roomy", LARGE_BATCH)
        return products(Work(work.folder, model), folder, token_batch_size=LARGE_BATCH, **options)

    def once(self) -> list[tuple[Setting, Work]]:
        """The settings that run once, for the rows that they would remove."""
        theirs, steps = partial(bergson, self.python), self.training
        back = partial(magic, steps=steps.steps, batch=steps.batch, rate=steps.rate)
        tail: dict[str, Any] = {"reduction": "sum", "is_product": False}
        return [
            (theirs("bergson, MAGIC", back, lowered_scores, covered=None, is_product=False), self.work),
            (theirs("bergson, EK-FAC, trained model", ekfac, written_scores, **tail), self.trained),
            (dualsft("dualsft, path along the target"), self.work),
            (dualsft("dualsft, first order, trained model", *AT_MODEL), self.trained),
        ]

    def refused(self) -> tuple[Setting, Work]:
        """bergson with all defaults, the size of its batches too."""
        steps = partial(products, token_batch_size=2048)
        return bergson(self.python, "bergson, 2,048 tokens a batch", steps, written_scores), self.work

    def cost(self, setting: Setting, work: Work, label: str = "") -> dict[str, Any]:
        """What a setting took on this work; it runs if it has not yet."""
        name = f"{slug(setting.name)}{label}"
        return kept(self.folder / "costs" / f"{name}.json", lambda: run(setting, work, self.folder / "runs" / name))

    def scores(self, setting: Setting) -> Tensor:
        """What it gave the rows of the pool, the first time it ran on them."""
        return setting.scores(self.folder / "runs" / slug(setting.name))


def cost_table(peers: Peers) -> list[dict[str, Any]]:
    """One line for each setting: medians over rounds."""
    for round_ in range(peers.options.rounds):
        label = f"-{round_}" if round_ else ""
        for setting in peers.timed():
            peers.cost(setting, peers.work, label)
            peers.cost(setting, peers.few, f"-few{label}")
    lines = [cost_line(peers, setting) for setting in peers.timed()]
    once = [(setting.name, peers.cost(setting, work)) for setting, work in [*peers.once(), peers.refused()]]
    return lines + [{"setting": name, **plain_cost(cost)} for name, cost in once]


def cost_line(peers: Peers, setting: Setting) -> dict[str, Any]:
    """The medians of a setting's rounds."""
    labels = [f"-{round_}" if round_ else "" for round_ in range(peers.options.rounds)]
    all_rows = [peers.cost(setting, peers.work, label) for label in labels]
    few_rows = [peers.cost(setting, peers.few, f"-few{label}") for label in labels]
    if any(cost["error"] for cost in all_rows + few_rows):
        return {"setting": setting.name, **plain_cost(all_rows[0])}
    middle = {key: statistics.median(cost[key] for cost in all_rows) for key in ("wall", "cpu", "memory", "disk")}
    start = statistics.median(cost["cpu"] for cost in few_rows)
    beyond = peers.options.rows - peers.options.few
    line = {"setting": setting.name, **plain_cost({**middle, "error": ""})}
    return {**line, f"CPU s, {peers.options.few} rows": start, "CPU ms a row": 1000 * (middle["cpu"] - start) / beyond}


def plain_cost(cost: dict[str, Any]) -> dict[str, Any]:
    """The cells of one run."""
    if cost["error"]:
        return {"failed": cost["error"]}
    sizes = {"peak MiB": cost["memory"] / MiB, "on disk MiB": cost["disk"] / MiB}
    return {"wall s": cost["wall"], "CPU s": cost["cpu"], **sizes}


def agreement_table(peers: Peers) -> list[dict[str, Any]]:
    """One line for each setting, and one for the loss alone."""
    exact = ExactScores(peers.work.model, peers.work)
    mean, summed = exact.of("mean"), exact.of("sum")
    lines = [agreement_line(peers, setting, exact) for setting in peers.timed()]
    losses = {"cosine, all": cosine(summed, mean), "Spearman, all": spearman(summed, mean)}
    return [*lines, {"setting": "exact, sum over tokens, against mean over tokens", **losses}]


def agreement_line(peers: Peers, setting: Setting, exact: ExactScores) -> dict[str, Any]:
    """How near a setting's scores are to the exact ones of the weights it covers, and of all."""
    if peers.cost(setting, peers.work)["error"] or setting.covered is None:
        return {"setting": setting.name}
    found, names = peers.scores(setting), setting.covered(peers.folder / "runs" / slug(setting.name))
    weights = sum(exact.sizes[name] for name in names)
    line: dict[str, Any] = {"setting": setting.name, "loss": setting.reduction, "weights": weights}
    line["share"] = weights / sum(exact.sizes.values())
    line["not covered"] = sorted({name.split(".")[-2] for name in exact.sizes if name not in set(names)})
    if setting.is_product:
        own = exact.of(setting.reduction, names)
        line.update({"cosine, own": cosine(found, own), "Spearman, own": spearman(found, own)})
    whole = exact.of(setting.reduction)
    return {**line, "cosine, all": cosine(found, whole), "Spearman, all": spearman(found, whole)}


def removal_table(peers: Peers) -> list[dict[str, Any]]:
    """One line for each setting: how much the held-out loss rises without its best rows."""
    timed = [setting for setting in peers.timed() if "the same" not in setting.name and "store" not in setting.name]
    settings = [(setting, peers.work) for setting in timed] + peers.once()
    worked = [setting for setting, work in settings if not peers.cost(setting, work)["error"]]
    scores = {setting.name: peers.scores(setting) for setting in worked}
    return [removal_line(peers, name, scores.get(name)) for name in [RANDOM, *scores]]


def removal_line(peers: Peers, name: str, scores: Tensor | None) -> dict[str, Any]:
    """The rises of one setting, and how many rows of the largest share are clean rows of the target."""
    rows, seeds = peers.options.rows, range(peers.options.seeds)
    line: dict[str, Any] = {"setting": name}
    for share, seed in product(SHARES, seeds):
        gone = drawn(rows, share, seed) if scores is None else highest(scores, share)
        loss = fitted(peers, f"{slug(name)}-{share}-{seed}", gone, seed)
        line.setdefault(f"rises, {share:.0%}", []).append(loss - fitted(peers, f"nothing-{seed}", set(), seed))
        line.setdefault(f"clean target, {share:.0%}", []).append(clean(peers.work, gone) / len(gone))
    print(name, flush=True)
    return line


def fitted(peers: Peers, name: str, gone: set[int], seed: int) -> float:
    """The held-out loss of one retraining, kept."""
    fit = partial(held_out_loss, peers.work, gone, peers.training, seed)
    return kept(peers.folder / "fits" / f"{name}.json", fit)


def clean(work: Work, rows: set[int]) -> int:
    """How many of these are rows of the target that nobody has spoilt."""
    sources = [json.loads(line)["source"] for line in work.records("pool").read_text(encoding="utf-8").splitlines()]
    return sum(sources[i] == "target" for i in rows)


def markdown(lines: list[dict[str, Any]]) -> str:
    """Lines as a table; lists of figures as their mean ± half a 95% interval."""
    columns = list(dict.fromkeys(key for line in lines for key in line))
    head = [f"| {' | '.join(columns)} |", f"| {' | '.join(['---', *['---:'] * (len(columns) - 1)])} |"]
    return "\n".join(head + [f"| {' | '.join(cell(line.get(key, '')) for key in columns)} |" for line in lines])


def cell(value: Any) -> str:
    """A value as the tables write it."""
    if isinstance(value, list) and value and isinstance(value[0], float):
        middle, half = interval(value)
        return f"{middle:+.3f} ± {half:.3f}" if half else f"{middle:.3f}"
    if isinstance(value, list):
        return ", ".join(value)
    if isinstance(value, float):
        return f"{value:.5f}" if abs(value) <= 1 else f"{value:.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bergson_python", type=Path, required=True, help="interpreter of bergson's environment")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/peers"))
    parser.add_argument("--rows", type=int, default=640, help="of the pool")
    parser.add_argument("--few", type=int, default=64, help="rows of the runs that tell what a start costs")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-3)
    options = parser.parse_args()
    training = Training(options.steps, options.batch, options.rate)
    peers = Peers(options.output_dir.absolute(), options.bergson_python.absolute(), options, training)
    found: dict[str, Any] = {"versions": {"bergson": versions(peers.python, ["bergson", *PACKAGES])}}
    for name, table in {"cost": cost_table, "agreement": agreement_table, "removal": removal_table}.items():
        found[name] = table(peers)
        print(f"\n{name}\n\n{markdown(found[name])}\n", flush=True)
        (peers.folder / "peers.json").write_text(json.dumps(found, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
