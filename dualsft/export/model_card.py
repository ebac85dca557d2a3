"""The model card: what was selected and how, how it was trained, how to load it, and how to get from base to result.

It is written from the record that a delta carries (`dualsft.export.provenance`), so that applying the delta gives the
same card as the training did; the card leaves out whatever the record lacks.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

FORMULA = (
    "With g_i the gradient of example i's mean loss and u = (η/n) P ⊙ (v − ½ η H (P ⊙ ḡ)) (first order: without the H "
    "term), one matrix M_ij = g_ij u_j scores both: an example by its row sum ⟨u, g_i⟩, a weight by its column sum "
    "u_j Σ_i g_ij ([arXiv 2605.06166](https://arxiv.org/abs/2605.06166))."
)
ALONG = (
    "Along a path θ_0 … θ_K in weight space with u_k = θ_k − θ_{k+1}, or another u_k that its rule defines, one matrix "
    "M_ij = Σ_k g_ij u_kj scores both: an example by its row sum, which is how far the path lowers its loss "
    "(counted as `normalize` says), a weight by its column sum."
)
_KEYS = ("preconditioner", "step_size", "warmup", "prior", "order", "combination", "near_duplicates", "control", "seed")
_LOADING = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```"""
_DELTA = """The change is also a file of its own, `delta.safetensors`: for each changed parameter `<name>.index` (int64,
flat) and `<name>.value`, and the hash of the base weights (`{fingerprint}`) in the metadata. With `dualsft`:

```bash
dualsft export apply --base {base} --delta delta.safetensors --output_dir tuned
dualsft export revert --model tuned --base {base} --delta delta.safetensors --output_dir restored
```"""
_ADAPTER = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}", dtype="{dtype}")
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```"""


def write_card(folder: Path, about: Mapping[str, Any], adapter: bool = False) -> None:
    """Write ``README.md``, from the record, into the folder of a model or of a PEFT adapter."""
    base, name = about["base"], about["base"]["name"]
    sections = [
        f"# {name}, fine-tuned{' in selected weights' if about.get('selection') else ''}",
        _summary(about, adapter),
        *_section("What was selected, and how", _selection(about.get("selection"))),
        *_section("Training", _training(about.get("training"))),
        "## Loading",
        _ADAPTER.format(base=name, dtype=base.get("dtype", "auto")) if adapter else _LOADING,
        "## Base and delta",
        _DELTA.format(fingerprint=base.get("fingerprint", "unknown"), base=name),
        *_section("Versions", [f"{package} {version}" for package, version in about.get("versions", {}).items()]),
    ]
    card = ModelCard(f"---\n{_metadata(base, adapter).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")
    card.save(folder / "README.md")


def legible(about: Mapping[str, Any]) -> dict[str, Any]:
    """A record without the sections that a card cannot show, because they have been edited."""
    kept = dict(about)
    for key, show in (("selection", _selection), ("training", _training)):
        try:
            show(about.get(key))
        except (TypeError, ValueError, LookupError, AttributeError):
            del kept[key]
    return kept


def _metadata(base: Mapping[str, Any], adapter: bool) -> ModelCardData:
    return ModelCardData(
        base_model=None if base["local"] or not _is_hub_id(base["name"]) else base["name"],
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["dualsft", "sparse-fine-tuning", "data-selection"],
    )


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _summary(about: Mapping[str, Any], adapter: bool) -> str:
    counts, base = about["counts"], about["base"]
    trained = f", of {counts['trained']:,} that were trained" if "trained" in counts else ""
    made_by = f"; made by `{about['made_by']}`" if "made_by" in about else ""
    made_by += "; here as an adapter for PEFT, equal to that up to float32 rounding" if adapter else ""
    return (
        f"{base['name']} (weights `{base['fingerprint']}`) with {counts['changed']:,} of its {counts['all']:,} weights "
        f"({counts['changed'] / counts['all']:.2%}) changed{trained}; all others have the bits of the base model as "
        f"loaded in {base['dtype']}{made_by}."
    )


def _section(title: str, lines: list[str]) -> list[str]:
    return [f"## {title}", "\n".join(f"- {line}" for line in lines)] if lines else []


def _selection(record: Mapping[str, Any] | None) -> list[str]:
    """One line for each entry of the selection's record."""
    if not record:
        return []
    lines = []
    if counts := record.get("counts"):
        examples, weights = counts["examples"], counts["parameters"]
        lines.append(f"examples: {examples['selected']:,} of {examples['rows']:,} ({examples['scored']:,} scored)")
        lines.append(f"weights: {weights['selected']:,} of {weights['scored']:,}")
    if budgets := record.get("budgets"):
        lines.append(f"budgets: data {_format(budgets['data'])}, weights {_format(budgets['parameters'])}")
    for key in ("scorer", "parameter_allocator", "data_allocator"):
        if part := record.get(key):
            options = ", ".join(f"{name} {_format(value)}" for name, value in part["options"].items())
            lines.append(f"{key.replace('_', ' ')}: `{part['class_path']}`{f' ({options})' if options else ''}")
    lines += [f"{key.replace('_', ' ')}: {_format(record[key])}" for key in _KEYS if key in record]
    if along := (path := record.get("path", {})).get("along"):
        chosen = {key: value for key, value in path.items() if value is not None and key != "along"}
        lines.append(f"path: `{along['class_path']}` ({_format({**along['options'], **chosen})})")
    lines += [f"{key}: {_format(record[key])}" for key in ("trainable", "frozen") if record.get(key)]
    if "predicted_improvement" in (prediction := record.get("prediction", {})):
        lines.append(f"predicted improvement of one step: {prediction['predicted_improvement']:.3g}")
    lines += _data("scored", record.get("data", {}).get("train", []))
    lines += _data("target", record.get("data", {}).get("validation", []))
    return [*lines, *([ALONG] if along else []), *([FORMULA] if "scorer" in record else [])]


def _data(role: str, sources: list[Mapping[str, Any]]) -> list[str]:
    lines = []
    for source in sources:
        named = f" {source['set']}" if "set" in source else ""
        rows = f", {source['rows']:,} rows" if "rows" in source else ""
        lines.append(f"{role} data{named}: {source.get('name', 'unnamed')}{rows}, SHA-256 `{source['fingerprint']}`")
    return lines


def _training(record: Mapping[str, Any] | None) -> list[str]:
    if not record:
        return []
    lines = []
    for optimizer in record.get("optimizer", []):
        options = ", ".join(f"{key} {_format(value)}" for key, value in optimizer.items() if key != "name")
        lines.append(f"optimizer: {optimizer['name']} ({options})")
    lines += [f"learning rate schedule: {name}" for name in record.get("lr_scheduler", [])]
    rest = [key for key in record if key not in ("optimizer", "lr_scheduler", "data") and record[key] is not None]
    lines += [f"{key.replace('_', ' ')}: {_format(record[key])}" for key in rest]
    return lines + _data("training", record.get("data", []))


def _format(value: Any) -> str:
    """A setting in plain text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_format(one)}" for key, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(_format, value)) or "none"
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)
