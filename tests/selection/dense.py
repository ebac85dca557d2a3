"""The method with every matrix written out: G, H column by column, u and both score vectors, in float64."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from dualsft.models.loading import load_model
from dualsft.objectives import example_losses
from dualsft.selection.warmup import EPS
from tests.cases import VOCABULARY, tiny_tokenizer
from tests.selection.runs import Inputs
from tests.selection.tiny import Example, collate


def save_dense_model(folder: Path, seed: int = 0) -> str:
    """A Llama of some 1,500 weights over the tokens of `tiny_tokenizer`, small enough for its Hessian."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.5,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@dataclass(frozen=True)
class Dense:
    """Everything at one scoring checkpoint, flat.

    Attributes:
        names: The parameters, in the order in which they are laid out.
        shapes: Their shapes.
        ids: The pool's examples.
        pool: G, (example, weight).
        validation: The gradients of the validation examples, (example, weight).
        hessian: H of the mean validation loss, (weight, weight).
        moments: ĉ, (weight).
    """

    names: list[str]
    shapes: list[torch.Size]
    ids: list[int]
    pool: Tensor
    validation: Tensor
    hessian: Tensor
    moments: Tensor

    @classmethod
    def at(cls, checkpoint: str, inputs: Inputs) -> "Dense":
        """Differentiate at this checkpoint, which has a second moment beside it."""
        model = load_model(checkpoint, "float64").eval()
        parameters = dict(model.named_parameters())
        moments = load_file(Path(checkpoint) / "second_moment.safetensors")
        pool, validation = inputs.examples("train"), inputs.examples("validation")
        with sdpa_kernel(SDPBackend.MATH):
            return cls(
                list(parameters),
                [p.shape for p in parameters.values()],
                list(pool),
                torch.stack([flat_gradient(model, [example]) for example in pool.values()]),
                torch.stack([flat_gradient(model, [example]) for example in validation.values()]),
                hessian(model, list(validation.values())),
                torch.cat([moments[name].double().flatten() for name in parameters]),
            )

    def preconditioner(self, name: str) -> Tensor:
        """P, (weight)."""
        return 1 / (self.moments.sqrt() + EPS) if name == "adam" else torch.ones_like(self.moments)

    def step(self, preconditioner: str) -> Tensor:
        """D = P ⊙ ḡ, (weight)."""
        return self.preconditioner(preconditioner) * self.pool.mean(0)

    def curvature(self, kind: str) -> Tensor:
        """The Hessian as a scorer sees it, (weight, weight)."""
        if kind == "second_moment":
            return self.moments.diag()
        if kind == "empirical_fisher":
            return self.validation.square().mean(0).diag()
        return self.hessian if kind == "hessian" else torch.zeros_like(self.hessian)

    def direction(self, kind: str, preconditioner: str, step_size: float) -> Tensor:
        """U = (η/n) P ⊙ (v − ½ η H d), (weight)."""
        slope = self.validation.mean(0) - step_size / 2 * self.curvature(kind) @ self.step(preconditioner)
        return step_size / len(self.ids) * self.preconditioner(preconditioner) * slope

    def flat(self, tensors: dict[str, Tensor]) -> Tensor:
        """By name to flat."""
        return torch.cat([tensors[name].double().flatten() for name in self.names])


def flat_gradient(model: PreTrainedModel, examples: Sequence[Example]) -> Tensor:
    """∇ of the mean loss, (weight)."""
    loss = torch.stack([example_losses(model, collate([example])).sum() for example in examples]).mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def hessian(model: PreTrainedModel, examples: Sequence[Example]) -> Tensor:
    """∇² of the mean loss: the derivatives of ∇ along unit vectors, 128 rows at a time."""
    parameters = list(model.parameters())
    loss = torch.stack([example_losses(model, collate([example])).sum() for example in examples]).mean()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)])
    rows = []
    for units in torch.eye(len(gradient), dtype=gradient.dtype).split(128):
        parts = torch.autograd.grad(gradient, parameters, units, retain_graph=True, is_grads_batched=True)
        rows.append(torch.cat([part.flatten(1) for part in parts], dim=1))
    return torch.cat(rows)
