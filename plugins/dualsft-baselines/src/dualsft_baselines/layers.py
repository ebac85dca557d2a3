"""What a parameter's name says of its place.

``model.layers.3.self_attn.q_proj.weight`` has a number on its path, so it is of a layer; embeddings, the
head and the last norm have none.
"""


def block(name: str) -> str:
    """The path of the block that a parameter belongs to: its own, without the module and the parameter's last name."""
    return ".".join(name.split(".")[:-2])


def in_a_layer(name: str) -> bool:
    """Whether a parameter is of a layer."""
    return any(part.isdigit() for part in name.split("."))
