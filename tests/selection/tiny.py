"""Tiny models of several architectures, tiny examples, and the slow obvious reference for all gradients."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dualsft.layout import Batch
from dualsft.objective import example_losses

VOCABULARY = 61
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(**options: Any) -> PreTrainedModel:
    """Untied unless asked."""
    return LlamaForCausalLM(LlamaConfig(**{**_SIZES, **options}))


def gpt2(**options: Any) -> PreTrainedModel:
    """Conv1D, learned positions shared by the batch, tied head, dropout 0.1 while training."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2, **options
    )
    return GPT2LMHeadModel(config)


def qwen3() -> PreTrainedModel:
    """Norms per head."""
    return Qwen3ForCausalLM(Qwen3Config(**_SIZES))


def gemma3(**options: Any) -> PreTrainedModel:
    """A scaled embedding, four norms a block, tied head."""
    return Gemma3ForCausalLM(Gemma3TextConfig(**{**_SIZES, "pad_token_id": 0, "sliding_window": 8, **options}))


def mixtral() -> PreTrainedModel:
    """Experts in one tensor over flattened tokens, routers."""
    config = MixtralConfig(**_SIZES, num_local_experts=3, num_experts_per_tok=2)
    model = MixtralForCausalLM(config)
    model.set_experts_implementation("eager")
    return model


def opt() -> PreTrainedModel:
    """A decoder layer that drops out by its own training flag."""
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        ffn_dim=24,
        num_attention_heads=2,
        word_embed_proj_dim=16,
    )
    return OPTForCausalLM(config)


ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "llama tied": lambda: llama(tie_word_embeddings=True),
    "llama with biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "gpt2": gpt2,
    "qwen3": qwen3,
    "gemma3": gemma3,
    "mixtral": mixtral,
    "opt": opt,
}


def make(architecture: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    """A model in evaluation mode whose norms and biases are random too, so that nothing is at a special point."""
    torch.manual_seed(seed)
    model = ARCHITECTURES[architecture]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype).eval()


Example = tuple[list[int], list[int]]
"""Token ids and labels."""


def make_examples(lengths: Sequence[int] = (9, 4, 13, 2, 7), seed: int = 1) -> list[Example]:
    """Examples of mixed lengths, the first third of each unsupervised; the id 0, which pads, occurs in each."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for length in lengths:
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
        ids[length // 2] = 0
        unsupervised = max(1, length // 3)
        examples.append((ids, [-100] * unsupervised + ids[unsupervised:]))
    return examples


def collate(examples: Sequence[Example], ids: Sequence[int] | None = None) -> Batch:
    """One right-padded batch; its example ids are the places in the sequence unless given."""
    tokens = [torch.tensor(ids) for ids, _ in examples]
    return {
        "example_id": torch.tensor(list(ids) if ids is not None else range(len(examples))),
        "input_ids": pad_sequence(tokens, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(t) for t in tokens], batch_first=True),
        "labels": pad_sequence([torch.tensor(labels) for _, labels in examples], batch_first=True, padding_value=-100),
    }


def given(batches: list[Batch]) -> Callable[[int], list[Batch]]:
    """Batches as a gradient pass takes them: from the k-th on."""
    return lambda first: batches[first:]


Gradients = dict[str, Tensor]


def gradient_loop(model: PreTrainedModel, examples: Iterable[Example]) -> list[Gradients]:
    """g_i of each example: autograd over one unpadded example at a time."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = []
    for example in examples:
        loss = example_losses(model, collate([example])).sum()
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        gradients.append(
            {
                name: torch.zeros_like(p) if g is None else g
                for (name, p), g in zip(parameters.items(), found, strict=True)
            }
        )
    return gradients


def total(gradients: Sequence[Gradients]) -> Gradients:
    """Σ_i g_i."""
    return {name: torch.stack([g[name].double() for g in gradients]).sum(0) for name in gradients[0]}


def inner(u: Gradients, g: Gradients) -> float:
    """<u, g> in float64."""
    return sum(float((u[name].double() * g[name].double()).sum()) for name in g)


def inner_size(u: Gradients, g: Gradients) -> float:
    """Σ_j |u_j g_j|, the size of the numbers that an inner product adds."""
    return sum(float((u[name].double() * g[name].double()).abs().sum()) for name in g)


def random_direction(model: PreTrainedModel, seed: int = 2) -> Gradients:
    """u, standard normal."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(
            torch.promote_types(p.dtype, torch.float32)
        )
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def assert_same_gradients(found: Gradients, expected: Gradients, relative: float) -> None:
    """Equal up to a fraction of each tensor's largest entry (some are zero but for rounding, as biases of keys)."""
    assert found.keys() == expected.keys()
    largest = max(float(reference.abs().max()) for reference in expected.values())
    for name, reference in expected.items():
        scale = max(float(reference.abs().max()), 1e-3 * largest)
        torch.testing.assert_close(found[name].double(), reference.double(), rtol=0.0, atol=relative * scale, msg=name)
