"""Ways to train on the same tokens: this project's engine, and loops in plain torch of its model and of its peers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron.config.optimizer import OptimizerConfig
from megatron.config.optimizers.adamw import AdamWConfig
from megatron.config.sections.run_config import RunConfig
from megatron.config.sections.training import BatchConfig, CheckpointedActivations
from megatron.data.micro_batch import MicroBatch, to_inputs_and_labels
from megatron.errors import ConfigError
from megatron.model.causal_lm import LocalCausalLM, VocabSize, build_local
from megatron.model.layer import TransformerLayer
from megatron.model.pattention import Pattention
from megatron.mpu.context import ParallelContext
from megatron.mpu.parameters import DTYPES
from megatron.mpu.random import seed_dropout
from megatron.training.build_engine import build_engine
from megatron.training.lr_scheduler import LRScheduler
from megatron.training.optimizer import parameter_groups
from megatron.training.stop_request import StopRequest
from tools.benchmarks.kernel_cases import published_pattention
from tools.benchmarks.peers import COMPILED, PUBLISHED, RECOMPUTING

# The plain loop scales fp16 losses by a constant: random tokens need no search for the right one.
FP16_LOSS_SCALE = 1024.0


@dataclass(frozen=True)
class Task:
    """Training that both contenders do."""

    config: RunConfig
    batch: BatchConfig
    vocab: VocabSize


class Contender(Protocol):
    """Takes optimizer steps."""

    def __init__(self, task: Task) -> None: ...

    def step(self) -> Tensor:
        """Takes one optimizer step; returns its loss, mean over the micro batches, still on the device."""
        ...


def random_batches(task: Task) -> Iterator[MicroBatch]:
    """Yields micro batches of uniformly random tokens without end, the same ones on every call."""
    generator = torch.Generator().manual_seed(task.config.training.seed)
    shape = (task.batch.micro_batch_size, task.config.model.seq_length + 1)
    while True:
        tokens = torch.randint(task.vocab.actual, shape, generator=generator)
        yield to_inputs_and_labels(tokens, eod_token=None)


class Engine:
    """This project's own training step. Needs an initialized process group of one rank."""

    def __init__(self, task: Task) -> None:
        self._seed = task.config.training.seed
        self._context = ParallelContext.create(1, 1)
        self._engine = build_engine(task.config, task.batch, task.vocab, self._context, StopRequest()).engine
        self._batches = random_batches(task)
        self._steps = 0

    def step(self) -> Tensor:
        seed_dropout(self._seed, self._steps, self._context)
        self._steps += 1
        loss: Tensor = self._engine.train_batch(self._batches)
        return loss.detach()


class PlainTorch:
    """Forward, backward, clip, AdamW, as one would write them for a single device, without DeepSpeed.

    In bf16 and fp16, as in the engine, the model computes in that format and AdamW updates fp32 copies of its weights.
    """

    def __init__(self, task: Task) -> None:
        training = task.config.training
        self._task = task
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = self.build_model(task).to(self._device, DTYPES[training.precision.dtype])
        # (fp32 weight that AdamW updates, weight that the model computes with): one and the same in fp32.
        self.weight_pairs = [
            (weight if weight.dtype == torch.float32 else nn.Parameter(weight.detach().float()), weight)
            for weight in self._model.parameters()
        ]
        self._loss_scale = FP16_LOSS_SCALE if training.precision.dtype == "fp16" else 1.0
        self._optimizer = self._build_optimizer()
        self._scheduler = LRScheduler(
            self._optimizer, peak=training.optimizer.lr, schedule=training.lr_schedule, train_iters=training.train_iters
        )
        self._batches = random_batches(task)

    def build_model(self, task: Task) -> nn.Module:
        """Builds the model on the CPU, in float32."""
        model = build_local(task.config.model, task.vocab, task.config.training.seed)
        recompute_layers(model, task.config.training.checkpoint_activations)
        return model

    def logits(self, inputs_BS: Tensor) -> Tensor:
        """Computes the logits [B, S, V] of a micro batch."""
        logits_BSV: Tensor = self._model(inputs_BS)
        return logits_BSV

    def groups(self, section: OptimizerConfig) -> list[dict[str, Any]]:
        """Returns the optimizer's groups of the model's parameters."""
        return parameter_groups(self._model, section)

    def step(self) -> Tensor:
        num_micro_batches = self._task.batch.gradient_accumulation_steps
        losses = []
        for _ in range(num_micro_batches):
            inputs, (labels, _) = next(self._batches)
            loss = self._loss(inputs.to(self._device), labels.to(self._device))
            torch.autograd.backward(loss * (self._loss_scale / num_micro_batches))
            losses.append(loss.detach())
        self._update()
        return torch.stack(losses).mean()

    def _loss(self, inputs_BS: Tensor, labels_BS: Tensor) -> Tensor:
        logits_BSV = self.logits(inputs_BS)
        if self._task.config.model.mask_padded_vocab:
            logits_BSV = logits_BSV[..., : self._task.vocab.actual]
        return F.cross_entropy(logits_BSV.float().flatten(0, 1), labels_BS.flatten())

    def _update(self) -> None:
        training = self._task.config.training
        copies = [(master, weight) for master, weight in self.weight_pairs if master is not weight]
        for master, weight in copies:
            if weight.grad is not None:
                master.grad = weight.grad.float() / self._loss_scale
                weight.grad = None
        if training.gradient_clipping:
            nn.utils.clip_grad_norm_([master for master, _ in self.weight_pairs], training.gradient_clipping)
        self._optimizer.step()
        self._scheduler.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            for master, weight in copies:
                weight.copy_(master)

    def _build_optimizer(self) -> torch.optim.AdamW:
        section = self._task.config.training.optimizer
        if not isinstance(section, AdamWConfig):
            raise ConfigError(f"optimizer.type: {section.type}: the plain loop is written for AdamW. Choose AdamW.")
        master_of = {weight: master for master, weight in self.weight_pairs}
        groups = self.groups(section)
        for group in groups:
            group["params"] = [master_of[weight] for weight in group["params"]]
        beta1, beta2 = section.betas
        return torch.optim.AdamW(groups, lr=section.lr, betas=(beta1, beta2), eps=section.eps)


class Recomputed(nn.Module):
    """Layers whose activations are recomputed in the backward pass."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x_BSD: Tensor) -> Tensor:
        y_BSD: Tensor = checkpoint(self.layers, x_BSD, use_reentrant=False)
        return y_BSD


def recompute_layers(model: LocalCausalLM, settings: CheckpointedActivations) -> None:
    """Wraps the transformer layers of `model` as the configuration asks."""
    if settings.enabled:
        layers, step = list(model.layers), settings.num_layers
        model.layers = nn.ModuleList(Recomputed(layers[i : i + step]) for i in range(0, len(layers), step))


class PublishedOperations(PlainTorch):
    """The loop in plain torch, with every Pattention by the operations of the published code."""

    def build_model(self, task: Task) -> nn.Module:
        model = super().build_model(task)
        for module in model.modules():
            if isinstance(module, Pattention):
                module.kernel = published_projections
        return model


def published_projections(
    x_BSD: Tensor, key_tokens: Sequence[Tensor], value_tokens: Sequence[Tensor], *, theta: str, **others: Any
) -> Tensor:
    """Computes the outputs [J, B, S, D] of Pattentions of one input, one after the other, on one rank."""
    pairs = zip(key_tokens, value_tokens, strict=True)
    return torch.stack([published_pattention(x_BSD, key, value, theta) for key, value in pairs])


class PublishedRecomputing(PublishedOperations):
    """The same with every layer recomputed in the backward pass, as the published runs did."""

    def build_model(self, task: Task) -> nn.Module:
        settings = task.config.training.checkpoint_activations.model_copy(update={"enabled": True})
        training = task.config.training.model_copy(update={"checkpoint_activations": settings})
        return super().build_model(replace(task, config=task.config.model_copy(update={"training": training})))


class PublishedCompiled(PublishedOperations):
    """The same with every layer compiled."""

    def build_model(self, task: Task) -> nn.Module:
        model = super().build_model(task)
        for module in model.modules():
            if isinstance(module, TransformerLayer):
                module.compile()
        return model


class TransformersLoop(PlainTorch):
    """The loop in plain torch, with the model of `transformers` that computes what ours does."""

    def build_model(self, task: Task) -> nn.Module:
        from tools.benchmarks.transformers_model import transformers_model

        if task.config.training.checkpoint_activations.enabled:
            raise ConfigError("checkpoint_activations: transformers' model keeps its activations. Set it to false.")
        ours = build_local(task.config.model, task.vocab, task.config.training.seed)
        model: nn.Module = transformers_model(ours, task.config, task.vocab).train()
        return model

    def logits(self, inputs_BS: Tensor) -> Tensor:
        logits_BSV: Tensor = self._model(inputs_BS, use_cache=False).logits
        return logits_BSV

    def groups(self, section: OptimizerConfig) -> list[dict[str, Any]]:
        parameters = list(self._model.parameters())
        return [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": section.weight_decay},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ]


CONTENDERS: dict[str, type[Contender]] = {
    "engine": Engine,
    "plain torch": PlainTorch,
    PUBLISHED: PublishedOperations,
    RECOMPUTING: PublishedRecomputing,
    **dict(zip(COMPILED, (Engine, PublishedCompiled), strict=True)),
    "Transformer, engine": Engine,
    "Transformer, transformers": TransformersLoop,
}
"""By the name in a table. Those whose name begins with Transformer train one of as many parameters (peers.py)."""
