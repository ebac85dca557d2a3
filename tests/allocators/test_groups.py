from functools import cache
from typing import Any

import pytest
import torch

from dualsft.allocators.groups import KINDS, kind_of, kinds, layer_of, layers
from tests.cases import ARCHITECTURES


@cache
def parameter_names(architecture: str) -> list[str]:
    """A real model's, without memory for its weights."""
    with torch.device("meta"):
        return [name for name, _ in ARCHITECTURES[architecture]().named_parameters()]


LISTS = {
    "gpt2": "transformer.h",
    "falcon": "transformer.h",
    "bloom": "transformer.h",
    "opt": "model.decoder.layers",
    "bert": "bert.encoder.layer",
    "rwkv": "rwkv.blocks",
    "mamba": "backbone.layers",
}
"""Where an architecture keeps its layers, if not in ``model.layers``."""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_real_models_have_their_layers(architecture: str) -> None:
    """Every parameter below the list of layers is in the layer of its number, and nothing else is in a layer."""
    where = LISTS.get(architecture, "model.layers")
    names = parameter_names(architecture)
    for name in names:
        below = name.startswith(f"{where}.")
        assert layer_of(name) == ((where, int(name.removeprefix(f"{where}.").split(".")[0])) if below else None)
    assert layers(names) == [[name for name in names if name.startswith(f"{where}.{n}.")] for n in (0, 1)]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("gpt_neox.layers.11.attention.dense.weight", ("gpt_neox.layers", 11)),
        ("model.layers.3.mlp.experts.5.w1.weight", ("model.layers", 3)),
        ("encoder.layers.1.fc1.weight", ("encoder.layers", 1)),
        ("decoder.layers.1.fc1.weight", ("decoder.layers", 1)),
        ("layers.0", ("layers", 0)),
        ("model.norm2.weight", None),
        ("model.layers2x.1a.weight", None),
        ("lm_head.weight", None),
    ],
)
def test_the_first_number_is_the_layer(name: str, layer: Any) -> None:
    """Experts' numbers are not layers, and the list's name tells stacks apart."""
    assert layer_of(name) == layer


def test_layers_are_in_order_of_number() -> None:
    """10 comes after 9."""
    names = [f"h.{n}.w" for n in (10, 9, 0)]
    assert layers([*names, "head", "h.9.b"]) == [["h.0.w"], ["h.9.w", "h.9.b"], ["h.10.w"]]


LLAMA = {
    **{f"self_attn.{kind}_proj": kind for kind in "qkvo"},
    **{f"mlp.{kind}_proj": kind for kind in ("gate", "up", "down")},
}
FALCON = {"self_attention.dense": "o", "mlp.dense_h_to_4h": "up", "mlp.dense_4h_to_h": "down"}
EXPERTS = {
    **{f"self_attn.{kind}_proj": kind for kind in "qkvo"},
    **{f"mlp.experts.{name}": "down" for name in ("down_proj", "down_proj_bias")},
}
EXPECTED: dict[str, dict[str, str]] = {
    **dict.fromkeys(("llama", "llama tied", "llama with biases", "qwen3", "gemma2", "gemma3", "doge"), LLAMA),
    **dict.fromkeys(("mixtral", "qwen3 moe", "gpt-oss"), EXPERTS),
    **dict.fromkeys(("falcon", "bloom"), FALCON),
    "gpt2": {"attn.c_proj": "o", "mlp.c_fc": "up", "mlp.c_proj": "down"},
    "deepseek v3": {
        **{"self_attn.q_a_proj": "q", "self_attn.q_b_proj": "q", "self_attn.o_proj": "o"},
        **{f"mlp.{kind}_proj": kind for kind in ("gate", "up", "down")},
        **{f"mlp.shared_experts.{kind}_proj": kind for kind in ("gate", "up", "down")},
        "mlp.experts.down_proj": "down",
    },
    "opt": {
        **{f"self_attn.{kind}_proj": kind for kind in "qkv"},
        **{"self_attn.out_proj": "o", "fc1": "up", "fc2": "down"},
    },
    "bert": {
        **{"attention.self.query": "q", "attention.self.key": "k", "attention.self.value": "v"},
        **{"attention.output.dense": "o", "intermediate.dense": "up", "output.dense": "down"},
    },
    "rwkv": {
        **{"attention.key": "k", "attention.value": "v", "attention.output": "o"},
        **{"feed_forward.receptance": "gate", "feed_forward.key": "up", "feed_forward.value": "down"},
    },
    "lfm2": {
        **{f"self_attn.{kind}_proj": kind for kind in "qkv"},
        **{"self_attn.out_proj": "o", "conv.out_proj": "o"},
        **{"feed_forward.w1": "gate", "feed_forward.w3": "up", "feed_forward.w2": "down"},
    },
    "mamba": {"mixer.out_proj": "o"},
}
"""Architecture -> module within a layer -> its kind; all else is other."""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_real_models_have_their_kinds(architecture: str) -> None:
    """Weights and biases alike are of their module's kind; all the rest, in and outside of layers, is other."""
    expected, seen = EXPECTED[architecture], set()
    for name in parameter_names(architecture):
        layer = layer_of(name)
        inside = name.removeprefix(".".join(map(str, layer)) + ".") if layer else name
        module = inside.removesuffix(".weight").removesuffix(".bias")
        assert kind_of(name) == expected.get(module, "other"), name
        seen.add(module)
    found = {kind_of(name) for name in parameter_names(architecture)}
    assert found == {*expected.values(), "other"}
    assert expected.keys() - seen <= {"mlp.experts.down_proj_bias"}  # of these mixtures GPT-OSS alone has it


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.3.mlp.experts.5.w1.weight", "gate"),
        ("model.layers.3.mlp.experts.5.w3.weight", "up"),
        ("model.layers.3.mlp.experts.5.w2.weight", "down"),
        ("gpt_neox.layers.0.attention.dense.bias", "o"),
        ("gpt_neox.layers.0.attention.query_key_value.weight", "other"),
        ("transformer.h.0.attn.out_proj.weight", "o"),
        ("transformer.h.0.mlp.fc_in.weight", "up"),
        ("transformer.h.0.mlp.fc_out.weight", "down"),
        ("layers.0.attention.wo.weight", "o"),
        ("layers.0.attention.wq.weight", "q"),
        ("layers.0.mlp.wo.weight", "other"),
        ("model.layers.0.self_attn.qkv_proj.weight", "other"),
        ("model.layers.0.mlp.gate.weight", "other"),
        ("model.layers.0.self_attn.q_proj.parametrizations.weight.original0", "q"),
        ("pooler.dense.weight", "other"),
        ("weight", "other"),
        ("q_proj", "q"),
    ],
)
def test_kinds_by_name(name: str, kind: str) -> None:
    """Other models, unfused experts, fused projections, routers, parametrized layers, and names of one part."""
    assert kind_of(name) == kind


def test_kinds_that_are_there() -> None:
    """Each kind's names together, in the kinds' order; those that the model lacks are left out."""
    names = ["norm", "a.down_proj.weight", "a.q_proj.weight", "b.q_proj.bias"]
    assert kinds(names) == [["a.q_proj.weight", "b.q_proj.bias"], ["a.down_proj.weight"], ["norm"]]
    assert KINDS == ("q", "k", "v", "o", "gate", "up", "down", "other")
