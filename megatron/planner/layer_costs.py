"""Costs of one transformer layer on one rank: what it keeps for its backward pass, and the work that it does.

An architecture is one module in `layers/` that registers how its costs follow from the configuration. Products with
weights are counted apart from the passes over tensors beside them: the first run at a device's rate of arithmetic, the
others at that of its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from megatron.config.architecture import ARCHITECTURES
from megatron.config.sections.model import ModelConfig
from megatron.planner.implementation import BYTES, Implementation
from megatron.registry import Registry

Spread = Literal["residual", "whole", "split"]
"""How tensor-parallel ranks hold a tensor: as the residual stream (a share of it each under sequence_parallel), all of
it on every rank, or a share each."""


@dataclass(frozen=True)
class Kept:
    """A tensor that waits for the backward pass."""

    what: str
    elements: float
    """Elements for each token, over all tensor-parallel ranks."""
    spread: Spread
    width: int | None = None
    """Bytes of an element; None means those of the run's number format."""


@dataclass(frozen=True)
class Product:
    """A product of the tokens with weights: `inputs` x `outputs` multiplications and additions for each token."""

    inputs: int
    outputs: int


@dataclass(frozen=True)
class Passes:
    """Passes over tensors for each token of one rank, as each of them reads and writes memory."""

    forward: float
    """Bytes in the forward pass."""
    backward: float
    """Bytes in the backward pass."""
    functions: float = 0.0
    """Evaluations of a GeLU or an exponential in both passes, which take a CPU longer than their bytes do."""

    def __add__(self, other: Passes) -> Passes:
        return Passes(self.forward + other.forward, self.backward + other.backward, self.functions + other.functions)


@dataclass(frozen=True)
class Shape:
    """The facts of a rank on which a layer's costs depend, besides the model's."""

    tensor: int
    """Tensor-parallel ranks."""
    sequence_parallel: bool
    width: int
    """Bytes of an element of the run's number format."""
    implementation: Implementation
    recompute_scores: bool = False

    def share(self, spread: Spread) -> float:
        """Returns the share of a tensor that a rank holds."""
        if spread == "split" or (spread == "residual" and self.sequence_parallel):
            return 1.0 / self.tensor
        return 1.0


@dataclass(frozen=True)
class LayerCosts:
    """Costs of one layer."""

    kept: tuple[Kept, ...]
    """What waits for the backward pass."""
    scratch: float
    """Most that the backward pass holds beside that [bytes for each token of a rank]."""
    products: tuple[Product, ...]
    """Products of the forward pass, over all tensor-parallel ranks. Backward has each twice."""
    passes: Passes
    messages: float
    """Elements that tensor-parallel ranks exchange for each token in the forward pass, in all-gathers and
    reduce-scatters of the residual stream's width; an all-reduce is one of each. The backward pass has as many."""
    exchanges: int
    """Exchanges of the forward pass, each of which waits for the slowest rank."""
    score_products: tuple[Product, ...] = ()
    """Products that `recompute_scores` has once more in the backward pass."""
    copied_weights: int = 0
    """Weights that are joined into one matrix before products, over all tensor-parallel ranks; both passes do it."""

    def kept_bytes(self, shape: Shape) -> float:
        """Returns what a rank keeps for each token [bytes]."""
        return kept_bytes(self.kept, shape)


def kept_bytes(kept: Iterable[Kept], shape: Shape) -> float:
    """Returns what tensors take on a rank for each token [bytes]."""
    return sum(one.elements * (one.width or shape.width) * shape.share(one.spread) for one in kept)


CostFunction = Callable[[ModelConfig, Shape], LayerCosts]
LAYER_COSTS: Registry[CostFunction] = Registry("costs of a layer", package="megatron.planner.layers")


@lru_cache(maxsize=256)
def layer_costs(model: ModelConfig, shape: Shape) -> LayerCosts:
    """Returns the costs of a layer of the model."""
    return LAYER_COSTS[model.architecture](model, shape)


def shape_of_rank(
    model: ModelConfig, dtype: str, tensor: int, sequence_parallel: bool, implementation: Implementation, scores: bool
) -> Shape:
    """Returns what costs depend on; `scores` says whether Pattention's scores are computed again."""
    has_scores = model.param_tokens is not None
    return Shape(tensor, sequence_parallel and tensor > 1, BYTES[dtype], implementation, scores and has_scores)


def rotated_share(model: ModelConfig) -> float:
    """Returns the share of queries and keys that is rotated; 0 for other kinds of positions."""
    if model.pos_emb != "rotary":
        return 0.0
    head = model.hidden_size // model.num_attention_heads
    return int(head * model.rotary_pct) / head


def weights_of(products: Iterable[Product]) -> int:
    """Counts the weights of products."""
    return sum(product.inputs * product.outputs for product in products)


def attention_kept(model: ModelConfig, shape: Shape, *, projected: int, rotated: int) -> list[Kept]:
    """Lists what causal attention keeps.

    Of queries, keys and values it keeps the tensors that it reads: `projected` features that lie in outputs of
    projections, and `rotated` ones that are new where positions are rotary.
    """
    heads, hidden, length = model.num_attention_heads, model.hidden_size, model.seq_length
    output = Kept("attention output", hidden, "split")
    if model.attention_dropout and not shape.implementation.on_gpu:
        # torch has no fused kernel with dropout on CPUs: probabilities before and after it, its mask, and copies of
        # what they were made of, all in fp32.
        copies = Kept("copies of queries, keys and values", 3 * hidden, "split", 4)
        return [copies, Kept("probabilities", 3 * heads * length, "split", 4), output]
    statistics = Kept("log of sums of attention", heads, "split", 4)
    kept = [Kept("queries, keys and values", projected, "split"), output, statistics]
    return [*kept, Kept("rotated queries and keys", rotated, "split")] if rotated_share(model) and rotated else kept


def norm_kept(model: ModelConfig, shape: Shape, what: str, *, of_input: bool, norm: str | None = None) -> list[Kept]:
    """Lists what a norm keeps, its output included; `of_input` counts its input. Without `norm` it is a sublayer's."""
    norm = norm or model.norm
    output = Kept(f"{what} output", model.hidden_size, "whole")
    if norm == "rmsnorm" and not shape.implementation.on_gpu:
        # torch computes it by single operations on CPUs, in fp32: the input as it is or widened, and both factors.
        own = of_input or shape.width < 4
        wide = Kept(f"{what} input and its scaled values, in fp32", (1 + own) * model.hidden_size, "residual", 4)
        return [wide, Kept(f"{what} statistics", 1, "residual", 4), output]
    # CPUs keep the mean and the deviation in the number format of the input.
    width = 4 if shape.implementation.on_gpu else None
    statistics = Kept(f"{what} statistics", 1 if norm == "rmsnorm" else 2, "residual", width)
    return [*([Kept(f"{what} input", model.hidden_size, "residual")] if of_input else []), statistics, output]


def dropout_kept(model: ModelConfig, shape: Shape) -> list[Kept]:
    """Lists the masks of dropout on both residual branches, which CPUs keep in the run's number format."""
    if not model.hidden_dropout:
        return []
    return [Kept("dropout masks", 2 * model.hidden_size, "residual", 1 if shape.implementation.on_gpu else None)]


def residual_passes(model: ModelConfig, shape: Shape) -> Passes:
    """Counts norms, residual sums, their gradients and dropout: both sublayers."""
    tensor = model.hidden_size * shape.width * shape.share("residual")
    dropout = 2 * (2 * shape.width + 1) * model.hidden_size * shape.share("residual") if model.hidden_dropout else 0.0
    return Passes(2 * (2 + 3) * tensor + dropout, 2 * (4 + 3) * tensor + dropout)


def rotary_passes(model: ModelConfig, shape: Shape, features: int) -> Passes:
    """Counts the rotation of queries and keys of so many `features` together."""
    share = rotated_share(model)
    if not share:
        return Passes(0.0, 0.0)
    plain = 2.0 * features * shape.width / shape.tensor
    if shape.implementation.rotary == "triton":
        return Passes(plain, plain)
    # Product with the cosine, turned halves, their product with the sine, sum, number format: then both parts joined.
    turned = share * features * (3 * (shape.width + 4) + 12 + 4 * shape.width) / shape.tensor
    return Passes(plain + turned, plain + turned)


def attention_scratch(model: ModelConfig, shape: Shape, key_value: int) -> float:
    """Returns what attention's backward pass holds: gradients of its output, queries, keys and values."""
    return (2 * model.hidden_size + 2 * key_value) * shape.width / shape.tensor


def replicated_biases(model: ModelConfig) -> int:
    """Counts the biases of a layer that every tensor-parallel rank has whole: those of outputs to the stream."""
    if not ARCHITECTURES[model.architecture].layer_biases(model):
        return 0
    return model.hidden_size * (model.use_bias_in_attn_linear + model.use_bias_in_mlp)
