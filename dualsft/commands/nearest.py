"""The key that a mistyped one was meant to be: by what other trainers call it, by its last name, or by its spelling."""

from collections.abc import Collection, Sequence
from difflib import SequenceMatcher

SYNONYMS: dict[str, tuple[str, ...]] = {
    "batch_tokens": ("max_tokens", "tokens_per_batch"),
    "batch_size": ("bs", "per_device_train_batch_size", "train_batch_size", "micro_batch_size"),
    "data_budget": ("budget", "examples", "num_examples", "top_k"),
    "parameter_budget": ("budget", "sparsity", "density", "weights"),
    "devices": ("gpus", "num_gpus", "n_gpus", "num_processes"),
    "accumulate_grad_batches": ("gradient_accumulation_steps", "grad_accum", "accumulate"),
    "accelerator": ("device",),
    "max_epochs": ("epochs", "num_epochs", "num_train_epochs"),
    "max_steps": ("steps", "num_steps"),
    "max_length": ("max_seq_length", "max_seq_len", "seq_len", "max_len", "cutoff_len", "block_size"),
    "learning_rate": ("lr",),
    "lr": ("lr", "learning_rate"),
    "optimizer.weight_decay": ("weight_decay", "wd"),
    "lr_scheduler": ("scheduler", "lr_scheduler_type", "lr_schedule"),
    "gradient_clip_val": ("max_grad_norm", "grad_clip", "clip"),
    "dtype": ("torch_dtype", "bf16", "fp16", "fp32"),
    "precision": ("bf16", "fp16", "mixed_precision"),
    "model_name_or_path": ("model", "model_name", "model_path", "model_id", "base_model", "base", "name"),
    "output_dir": ("out", "output", "out_dir", "output_path", "save_dir", "dir"),
    "seed_everything": ("seed", "random_seed"),
    "data.train": ("train", "train_file", "train_data", "train_files", "dataset", "dataset_name", "data_path", "pool"),
    "data.validation": ("val", "eval", "valid", "target", "validation_file", "val_data", "eval_data", "eval_dataset"),
    "scorer": ("method", "score"),
    "warmup.fraction": ("warmup", "warmup_ratio", "warmup_fraction"),
    "warmup.checkpoint": ("checkpoint",),
    "prior.weight": ("prior", "lambda", "lambda_prior"),
    "gradient_checkpointing": ("checkpointing", "activation_checkpointing"),
    "offload_optimizer": ("offload", "cpu_offload", "optimizer_offload"),
    "offload_sums": ("offload_gradients", "gradient_offload"),
    "resume": ("resume_from_checkpoint", "continue"),
    "overwrite": ("force", "overwrite_output_dir"),
}
"""End of a key -> what people call it who come from other trainers."""
_CUTOFF, _MOST = 0.74, 2


def nearest(key: str, known: Collection[str]) -> list[str]:
    """The one or two known keys that a mistyped one resembles most, best first; none if nothing does."""
    known = dict.fromkeys(known)
    section, _, name = key.replace("-", "_").rpartition(".")
    meant = {end for end, others in SYNONYMS.items() if name in others}
    for found in (
        [of for of in known if any(f".{of}".endswith(f".{end}") for end in meant)],
        [of for of in known if of.rpartition(".")[2] == name],
        _alike(key, name, known),
    ):
        if found:
            return _best(section, key, found)
    return []


def _alike(key: str, name: str, known: Collection[str]) -> list[str]:
    """The keys that are spelt alike, as a whole or in their last name."""
    return [of for of in known if max(_ratio(key, of), _ratio(name, of.rpartition(".")[2]) - 0.05) >= _CUTOFF]


def _best(section: str, key: str, found: Sequence[str]) -> list[str]:
    """Those of the section that was named, where there are any; of these the best one, or two that are as good."""
    same = [of for of in found if section and of.startswith(f"{section}.")] or found
    ranked = sorted(same, key=lambda of: -_ratio(key, of))
    return [of for of in ranked[:_MOST] if _ratio(key, of) > _ratio(key, ranked[0]) - 0.1]


def _ratio(a: str, b: str) -> float:
    return SequenceMatcher(None, a, b, autojunk=False).ratio()
