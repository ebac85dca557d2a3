"""Tiny models of several architectures, tiny examples, and directions."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DogeConfig,
    DogeForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from dualsft.data.layout import Batch
from dualsft.data.packing import collate_packed
from dualsft.models.experts import group_experts

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


def gemma2() -> PreTrainedModel:
    """Attention in plain steps with capped scores, which returns its weights; norms in float32."""
    return Gemma2ForCausalLM(Gemma2Config(**{**_SIZES, "pad_token_id": 0, "sliding_window": 16}))


def gemma3(**options: Any) -> PreTrainedModel:
    """A scaled embedding, four norms a block, tied head."""
    return Gemma3ForCausalLM(Gemma3TextConfig(**{**_SIZES, "pad_token_id": 0, "sliding_window": 8, **options}))


def gemma3n() -> PreTrainedModel:
    """Several streams scaled to the norm of the first, embeddings of their own for each layer, sparse activations."""
    options: dict[str, Any] = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    options |= {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 4, "laurel_rank": 2}
    options |= {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.95, 0.0], "pad_token_id": 0}
    return Gemma3nForCausalLM(Gemma3nTextConfig(**{**_SIZES, **options}))


def mixtral() -> PreTrainedModel:
    """Experts in one tensor over flattened tokens, routers."""
    return MixtralForCausalLM(MixtralConfig(**_SIZES, num_local_experts=3, num_experts_per_tok=2))


def qwen3_moe() -> PreTrainedModel:
    """Norms per head, narrow experts."""
    options: dict[str, Any] = {"moe_intermediate_size": 12, "num_experts": 3, "num_experts_per_tok": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**_SIZES, **options))


def deepseek_v3() -> PreTrainedModel:
    """Attention through a bottleneck; a dense layer, then one of routed and shared experts in groups."""
    bottleneck = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    experts = {"moe_intermediate_size": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
    groups = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 2}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**{**_SIZES, **bottleneck, **experts, **groups}))


def gpt_oss() -> PreTrainedModel:
    """Attention that owns sinks and returns its weights, experts with biases."""
    options: dict[str, Any] = {"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 16}
    return GptOssForCausalLM(GptOssConfig(**_SIZES, **options, rope_parameters=None))


def falcon() -> PreTrainedModel:
    """Attention and MLP side by side, whose outputs are modified in place."""
    return FalconForCausalLM(
        FalconConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    )


def bloom() -> PreTrainedModel:
    """Positions as biases of attention, a norm behind the embedding, tied head."""
    return BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=2))


def bert() -> PreTrainedModel:
    """A head whose bias is its own and its child's; learned positions and types shared by the batch."""
    return BertLMHeadModel(BertConfig(**_SIZES, is_decoder=True))


def doge() -> PreTrainedModel:
    """Attention that owns a weight and calls a fused kernel; residuals with weights."""
    return DogeForCausalLM(DogeConfig(**_SIZES))


def lfm2() -> PreTrainedModel:
    """A gated convolution over tokens, whose weight its parent uses."""
    layers = {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "num_key_value_heads": 2}
    return Lfm2ForCausalLM(Lfm2Config(**{**_SIZES, **layers}))


def mamba() -> PreTrainedModel:
    """A state space, its convolution used by the mixer around it."""
    return MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4))


def rwkv() -> PreTrainedModel:
    """A recurrent state instead of attention."""
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "attention_hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
    }
    return RwkvForCausalLM(RwkvConfig(vocab_size=VOCABULARY, context_length=64, **sizes))


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
    "gemma2": gemma2,
    "gemma3": gemma3,
    "mixtral": mixtral,
    "qwen3 moe": qwen3_moe,
    "deepseek v3": deepseek_v3,
    "gpt-oss": gpt_oss,
    "opt": opt,
    "falcon": falcon,
    "bloom": bloom,
    "bert": bert,
    "doge": doge,
    "rwkv": rwkv,
    "lfm2": lfm2,
    "mamba": mamba,
}


def make(architecture: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    """A model in evaluation mode whose norms and biases are random too, so that nothing is at a special point."""
    torch.manual_seed(seed)
    model: Any = ARCHITECTURES[architecture]()
    group_experts(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    made: PreTrainedModel = model.to(dtype).eval()
    return made


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


def pack(rows: Sequence[Sequence[int]], examples: Sequence[Example]) -> Batch:
    """Rows of examples, given by their places, which are their ids."""
    named = [{"example_id": k, "input_ids": ids, "labels": labels} for k, (ids, labels) in enumerate(examples)]
    batch: Any = collate_packed([[named[k] for k in row] for row in rows], pad_token_id=0)
    return batch


@contextmanager
def chunks_of(tokens: int, kept: int = 0) -> Iterator[None]:
    """Losses are computed in chunks of this many supervised tokens, of models of this vocabulary.

    Logits of so many tokens are kept for backward, beside the last chunk, of a model in float64.
    """
    with (
        mock.patch("dualsft.objectives.chunks.LARGEST", 4 * VOCABULARY * tokens),
        mock.patch("dualsft.objectives.likelihood.KEPT", 8 * VOCABULARY * kept),
    ):
        yield


def given(batches: list[Batch]) -> Callable[[int], list[Batch]]:
    """Batches as a gradient pass takes them: from the k-th on."""
    return lambda first: batches[first:]


Gradients = dict[str, Tensor]
"""Parameter name -> one value for each weight."""


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
