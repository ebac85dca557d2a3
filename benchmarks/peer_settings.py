"""What `benchmarks/peers.py` compares: every setting of each tool, run on the same work, and what it left."""

import argparse
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from peer_removal import Training, save_trained
from peer_tools import (
    PROJECTION,
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
    written_scores,
)
from peer_work import Work, kept, roomy_copy, write_work
from torch import Tensor

FIRST_ORDER = ("--model.path.along", "null", "--model.scorer", "first_order", "--model.preconditioner", "none")
AT_MODEL = (*FIRST_ORDER, "--model.warmup.fraction", "0")
LARGE_BATCH = 4096
"""Tokens of a batch in the quick start's configuration; bergson takes no more than the model has positions."""
TRAINED = 1000
"""The seed of the trained model that some settings score at; no retraining has it."""


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
            save_trained(self.work, model, self.training, TRAINED)
            kept(self.folder / "trained.json", lambda: TRAINED)
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
