"""The tables of `benchmarks/peers.py`: lists of lines, each a column's name -> its value, and how they are printed."""

import json
import statistics
from functools import partial
from itertools import product
from typing import Any

from peer_exact import ExactScores, cosine, spearman
from peer_removal import drawn, held_out_loss, highest, interval
from peer_settings import Peers
from peer_tools import MiB, Setting, slug
from peer_work import Work, kept
from torch import Tensor

SHARES = (0.01, 0.1)
STYLES = {"share": ".1%", "cosine": ".5f", "Spearman": ".5f"}
"""How a column that starts so writes its figures."""
RANDOM = "random"


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
    """One line for each setting, and one for the loss alone; kept."""
    return kept(peers.folder / "agreement.json", partial(agreements, peers))


def agreements(peers: Peers) -> list[dict[str, Any]]:
    """The lines of that table."""
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
    """The rises of one setting, and which share of those rows is the target's, or spoilt."""
    rows, seeds = peers.options.rows, range(peers.options.seeds)
    line: dict[str, Any] = {"setting": name}
    for share, seed in product(SHARES, seeds):
        gone = drawn(rows, share, seed) if scores is None else highest(scores, share)
        loss = fitted(peers, f"{slug(name)}-{share}-{seed}", gone, seed)
        line.setdefault(f"rises, {share:.0%}", []).append(loss - fitted(peers, f"nothing-{seed}", set(), seed))
        for source in ("target", "spoilt"):
            line.setdefault(f"{source}, {share:.0%}", []).append(count_of(source, peers.work, gone) / len(gone))
    print(name, flush=True)
    return line


def fitted(peers: Peers, name: str, gone: set[int], seed: int) -> float:
    """The held-out loss of one retraining, kept."""
    fit = partial(held_out_loss, peers.work, gone, peers.training, seed)
    return kept(peers.folder / "fits" / f"{name}.json", fit)


def count_of(source: str, work: Work, rows: set[int]) -> int:
    """How many of these rows are the target's own, or of its form and with wrong answers (``spoilt``)."""
    sources = [json.loads(line)["source"] for line in work.records("pool").read_text(encoding="utf-8").splitlines()]
    return sum(sources[i] == source for i in rows)


def markdown(lines: list[dict[str, Any]]) -> str:
    """Lines as a table without what is a list of words; lists of figures as their mean ± half a 95% interval."""
    shown = [{key: value for key, value in line.items() if not _is_words(value)} for line in lines]
    columns = list(dict.fromkeys(key for line in shown for key in line))
    head = [f"| {' | '.join(columns)} |", f"| {' | '.join(['---', *['---:'] * (len(columns) - 1)])} |"]
    return "\n".join(head + [f"| {' | '.join(cell(key, line.get(key, '')) for key in columns)} |" for line in shown])


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


def cell(column: str, value: Any) -> str:
    """A value as the tables write it."""
    if isinstance(value, list):
        middle, half = interval(value)
        return f"{middle:+.3f} ± {half:.3f}" if column.startswith("rises") else f"{middle:.0%}"
    if isinstance(value, float):
        return format(value, next((style for start, style in STYLES.items() if column.startswith(start)), ".1f"))
    return f"{value:,}" if isinstance(value, int) else str(value)
