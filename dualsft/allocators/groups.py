"""Recognises by its name the layer and the kind of module that a parameter belongs to.

Names are those that causal language models have in `transformers`: Llama and its kin (Qwen, Gemma, Mistral, Mixtral,
DeepSeek, ...), GPT-2, GPT-J, GPT-NeoX, OPT, Phi, Bloom, Falcon, BERT, RWKV, Mamba.
"""

import re
from collections.abc import Collection, Iterable

KINDS = ("q", "k", "v", "o", "gate", "up", "down", "other")
"""Projections to queries, keys, values, and out of attention or another mixer; the feed-forward's three; all else."""

_ANYWHERE = {
    **dict.fromkeys(("q_proj", "q_a_proj", "q_b_proj", "wq"), "q"),
    **dict.fromkeys(("k_proj", "wk"), "k"),
    **dict.fromkeys(("v_proj", "wv"), "v"),
    **dict.fromkeys(("o_proj", "out_proj"), "o"),
    **dict.fromkeys(("gate_proj", "w1"), "gate"),
    **dict.fromkeys(("up_proj", "w3", "fc1", "fc_in", "c_fc", "dense_h_to_4h"), "up"),
    **dict.fromkeys(("down_proj", "w2", "fc2", "fc_out", "dense_4h_to_h"), "down"),
}
_IN_ATTENTION = {
    **_ANYWHERE,
    **{"query": "q", "key": "k", "value": "v"},
    **dict.fromkeys(("c_proj", "dense", "output", "wo"), "o"),
}
_ELSEWHERE = {
    **_ANYWHERE,
    **dict.fromkeys(("intermediate.dense", "feed_forward.key"), "up"),
    **dict.fromkeys(("output.dense", "feed_forward.value", "c_proj"), "down"),
    "feed_forward.receptance": "gate",
}

_PARAMETER = re.compile(r"(\.weight|[._]bias|\.parametrizations\..*)$")
"""What follows a module's name; a biased expert's is ``down_proj_bias``."""


def layer_of(name: str) -> tuple[str, int] | None:
    """The first numbered list of modules in a name, with the number: ``("transformer.h", 3)``; None if it has none.

    Experts of a layer are numbered too, but later in the name; the stacks of an encoder and a decoder differ in the
    list's name.
    """
    match = re.match(r"(.+?)\.(\d+)(\.|$)", name)
    return (match[1], int(match[2])) if match else None


def kind_of(name: str) -> str:
    """One of `KINDS`, by the module that a parameter belongs to: ``q_proj.bias`` is q.

    A module that holds several kinds in one tensor (``c_attn``, ``query_key_value``, ``gate_up_proj``, ...) is other,
    as are routers, norms and embeddings.
    """
    *path, module = _PARAMETER.sub("", name).split(".")
    attention = any("attn" in part or "attention" in part for part in path)
    table = _IN_ATTENTION if attention else _ELSEWHERE
    with_parent = ".".join([*path[-1:], module])
    return table.get(with_parent) or table.get(module, "other")


def place_of(name: str) -> tuple[int | None, str]:
    """The number of a parameter's layer, None if it is in none, and its kind."""
    layer = layer_of(name)
    return None if layer is None else layer[1], kind_of(name)


def layers(names: Iterable[str]) -> list[list[str]]:
    """The names of each layer's parameters, layers in order; names outside of all layers are left out."""
    groups: dict[tuple[str, int], list[str]] = {}
    for name in names:
        if layer := layer_of(name):
            groups.setdefault(layer, []).append(name)
    return [groups[layer] for layer in sorted(groups)]


def kinds(names: Collection[str]) -> list[list[str]]:
    """The names of each kind's parameters, in the order of `KINDS`; kinds that the model lacks are left out."""
    of_kind = [[name for name in names if kind_of(name) == kind] for kind in KINDS]
    return [group for group in of_kind if group]
