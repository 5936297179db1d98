"""Operations whose kernels are compared, each as calls that do the same work, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.config.architectures.tokenformer import param_tokens
from megatron.config.sections.run_config import RunConfig
from megatron.kernels.backends import Machine, Operation
from megatron.kernels.pattention.blocked_passes import BlockedPasses
from megatron.kernels.pattention.pattention import PATTENTION
from megatron.kernels.pattention.theta import THETAS, RowReduction
from megatron.kernels.rotary.rotary import ROTARY
from megatron.model.loss import CausalLMLoss, FusedCausalLMLoss
from megatron.model.positions import RotaryEmbedding
from megatron.mpu.context import ParallelContext
from megatron.mpu.parameters import DTYPES

Results = Sequence[Tensor]
SPREAD = 0.02
"""Standard deviation of weights, as training starts from."""


@dataclass(frozen=True)
class Case:
    """One operation on the tensors of one micro batch."""

    name: str
    baseline: str
    """The call that the others are compared with."""
    calls: dict[str, Callable[[], Results]]
    """Forward and backward pass by contender: outputs and gradients, the same ones of each."""
    limit: str = ""
    """A call that does a part of the work which nothing can leave out; its results are others."""
    flops: float | None = None
    """Arithmetic of matrix products [FLOP]."""
    bytes_moved: float | None = None
    """Bytes that a single pass over the data reads and writes, forward and backward."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Contenders that cannot run here, and why."""


class Cases:
    """The cases of a configured model's sizes, with `rows` tokens of the sequence."""

    def __init__(self, config: RunConfig, rows: int, vocab_rows: int, skipped: Sequence[str]) -> None:
        self.model, self.rows, self.vocab_rows, self.skipped = config.model, rows, vocab_rows, skipped
        self.on_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.on_gpu else "cpu")
        self.dtype = DTYPES[config.training.precision.dtype]
        tokens = config.model.param_tokens
        self.theta = None if tokens is None else tokens.theta
        self.machine = Machine(self.on_gpu, config.training.precision.dtype, self.theta)
        self.generator = torch.Generator(self.device).manual_seed(config.training.seed)

    def all(self) -> Iterator[Case]:
        """Yields the cases, those of Pattention where the model has it."""
        if self.theta is not None:
            tokens = param_tokens(self.model)
            yield self.pattention("query, key and value", 3, tokens.qkv)
            yield self.pattention("feed-forward", 1, tokens.ffn)
            yield self.row_passes("rows of feed-forward scores", tokens.ffn)
        if self.model.pos_emb == "rotary":
            yield self.rotary()
        yield self.head_and_loss()

    def draw(self, *shape: int, scale: float = 1.0) -> Tensor:
        numbers = torch.randn(shape, generator=self.generator, device=self.device) * scale
        return numbers.to(self.dtype)

    def backends(self, operation: Operation[Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """Returns the functions of the backends that run here, and why others do not."""
        functions, left_out = {}, {}
        for name in operation:
            obstacle = operation[name].obstacle(self.machine)
            if name in self.skipped:
                left_out[name] = "as asked"
            elif name == "triton" and not self.on_gpu:
                left_out[name] = "no GPU: Triton's interpreter tells results, not times"
            elif obstacle is not None:
                left_out[name] = obstacle
            else:
                functions[name] = operation[name].load()
        return functions, left_out

    def pattention(self, name: str, num_projections: int, num_tokens: int) -> Case:
        """Compares whole Pattentions of one input; what products alone take is their limit."""
        width, theta = self.model.hidden_size, self.theta
        x = self.draw(1, self.rows, width)
        keys, values = ([self.draw(num_tokens, width, scale=SPREAD) for _ in range(num_projections)] for _ in range(2))
        probe = self.draw(num_projections, 1, self.rows, width)

        def differentiated(forward: Callable[[Tensor, Results, Results], Tensor]) -> Callable[[], Results]:
            def call() -> Results:
                leaves = [leaf.detach().requires_grad_() for leaf in (x, *keys, *values)]
                y = forward(leaves[0], leaves[1 : 1 + num_projections], leaves[1 + num_projections :])
                return [y.detach(), *torch.autograd.grad(y, leaves, probe)]

            return call

        def by_backend(function: Any) -> Callable[[], Results]:
            options = {"theta": theta, "scale_base": num_tokens, "rows": RowReduction()}
            return differentiated(lambda x, keys, values: function(x, keys, values, **options))

        def published(x: Tensor, keys: Results, values: Results) -> Tensor:
            pairs = zip(keys, values, strict=True)
            return torch.stack([published_pattention(x, key, value, str(theta)) for key, value in pairs])

        def products() -> Results:
            x_RD, key_JpD, value_pN = x[0], torch.cat(keys), torch.stack(values)
            a = (x_RD @ key_JpD.T).view(self.rows, num_projections, -1)
            y = torch.bmm(a.transpose(0, 1), value_pN)
            dh = torch.bmm(probe[:, 0], value_pN.transpose(1, 2))
            da = dh.transpose(0, 1).flatten(1)
            return [y, da @ key_JpD, da.T @ x_RD, torch.bmm(a.permute(1, 2, 0), probe[:, 0])]

        functions, left_out = self.backends(PATTENTION)
        calls = {name: by_backend(function) for name, function in functions.items()}
        calls["published operations"] = differentiated(published)
        if "compile" in functions:
            calls["published operations, compiled"] = differentiated(torch.compile(published))
        calls["products alone"] = products
        flops = 12.0 * num_projections * self.rows * num_tokens * width
        return Case(name, "eager", calls, limit="products alone", flops=flops, left_out=left_out)

    def row_passes(self, name: str, num_tokens: int) -> Case:
        """Compares Theta's passes over given scores; copies of as many bytes are their limit."""
        a, g = self.draw(self.rows, 1, num_tokens), self.draw(self.rows, 1, num_tokens)
        functions, left_out = self.backends(PATTENTION)
        makers: dict[str, Any] = {"eager": BlockedPasses}
        if "compile" in functions:
            from megatron.kernels.pattention.compiled_passes import CompiledPasses

            makers["compile"] = CompiledPasses
        if "triton" in functions:
            from megatron.kernels.pattention.triton_passes import TritonPasses

            makers["triton"] = TritonPasses

        def by(passes: Any) -> Callable[[], Results]:
            scores, gradient = a.clone(), g.clone()

            def call() -> Results:
                # The kernels write over both, which costs the time of a copy; all contenders pay it.
                scores.copy_(a)
                gradient.copy_(g)
                h, statistic = passes.weigh(scores, num_tokens, RowReduction())
                _, da = passes.differentiate(
                    gradient,
                    scores,
                    statistic,
                    scale_base=num_tokens,
                    rows=RowReduction(),
                    scores_are_spent=True,
                )
                return [h, da]

            return call

        buffers = [torch.empty_like(a) for _ in range(5)]

        def copies() -> Results:
            for buffer in buffers:
                buffer.copy_(a)
            return buffers

        calls = {name: by(maker(self.theta)) for name, maker in makers.items()}
        moved = (5 * 2) * a.numel() * a.element_size()
        calls["copies alone"] = copies
        return Case(name, "eager", calls, limit="copies alone", bytes_moved=moved, left_out=left_out)

    def rotary(self) -> Case:
        """Compares rotations of queries and keys."""
        heads = self.model.num_attention_heads
        shape = (1, self.rows, heads, self.model.hidden_size // heads)
        q, k, probe_q, probe_k = (self.draw(*shape) for _ in range(4))
        tables = RotaryEmbedding(self.model).tables(torch.arange(self.rows, device=self.device).unsqueeze(0))

        def by(function: Any) -> Callable[[], Results]:
            def call() -> Results:
                leaves = [leaf.detach().requires_grad_() for leaf in (q, k)]
                turned = function(*leaves, *tables)
                return [*(x.detach() for x in turned), *torch.autograd.grad(turned, leaves, [probe_q, probe_k])]

            return call

        functions, left_out = self.backends(ROTARY)
        calls = {name: by(function) for name, function in functions.items()}
        if "compile" not in self.skipped:
            calls["eager, compiled"] = by(torch.compile(functions["eager"]))
        moved = 8 * q.numel() * q.element_size()
        return Case("rotary positions", "eager", calls, bytes_moved=moved, left_out=left_out)

    def head_and_loss(self) -> Case:
        """Compares losses from the head's input: of whole logits, in chunks, and torch's own in chunks."""
        width = self.model.hidden_size
        x, weight = self.draw(1, self.rows, width), self.draw(self.vocab_rows, width, scale=SPREAD)
        labels = torch.randint(self.vocab_rows, (1, self.rows), generator=self.generator, device=self.device)
        targets = (labels, torch.ones(1, self.rows, device=self.device))
        single = ParallelContext.single()

        def by(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Results]:
            def call() -> Results:
                leaves = [leaf.detach().requires_grad_() for leaf in (x, weight)]
                value = loss(*leaves)
                return [value.detach(), *torch.autograd.grad(value, leaves)]

            return call

        calls = {
            "whole logits": by(lambda x, w: CausalLMLoss(None, single)(F.linear(x, w), targets)),
            "in chunks": by(lambda x, w: FusedCausalLMLoss(None, single)((x, w), targets)),
            "torch's linear_cross_entropy, unchunked": by(lambda x, w: F.linear_cross_entropy(x[0], w, labels[0])),
        }
        return Case("head and loss", "whole logits", calls, flops=6.0 * self.rows * width * self.vocab_rows)


def published_pattention(x: Tensor, key: Tensor, value: Tensor, theta: str) -> Tensor:
    """Computes one Pattention by the operations of the published code, one after the other.

    TokenFormer@4d56c73, megatron/model/tokenformer.py: with its multiplications by a scale of 1 and a mask of ones.
    """
    scores = x @ key.T * 1.0
    scores = scores * torch.ones(scores.shape[-2], scores.shape[-1], dtype=scores.dtype, device=scores.device)
    root = math.sqrt(scores.shape[-1])
    if theta == "softmax":
        exponentials = scores.exp()
        weights = exponentials / exponentials.norm(p=1, dim=-1, keepdim=True) * scores.shape[-1]
    elif theta == "gelu_l2_norm":
        activations = F.gelu(scores)
        weights = activations / activations.norm(p=2, dim=-1, keepdim=True) * root
    elif theta == "l2_norm_gelu":
        weights = F.gelu(scores / scores.norm(p=2, dim=-1, keepdim=True) * root)
    else:
        weights = THETAS[theta].definition(scores, scores.shape[-1])
    y: Tensor = weights @ value
    return y
