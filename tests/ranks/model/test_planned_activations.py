"""The activations that the planner counts for a stage are, to the byte, what is alive after its forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import yaml
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron.config.load_config import load_config
from megatron.model.causal_lm import VocabSize
from megatron.model.pipeline import build_pipeline
from megatron.mpu.context import ParallelContext
from megatron.mpu.parameters import DTYPES
from megatron.planner.implementation import implementation_of
from megatron.planner.memory import ACTIVATIONS, rank_memory
from megatron.planner.stages import stages_of
from tests.helpers.configs import GPT2, LLAMA, PYTHIA, TOKENFORMER
from tests.helpers.covers import covered
from tests.helpers.distributed import run_distributed

ROWS, SAMPLES = 128, 2
LONGER = {"num_layers": 4, "seq_length": 48, "max_position_embeddings": 48, "padded_vocab_size": ROWS}
LONGER |= {"train_micro_batch_size_per_gpu": SAMPLES, "gradient_accumulation_steps": 1}
ARCHITECTURES = {"tokenformer": TOKENFORMER, "gpt_neox": PYTHIA, "gpt2": GPT2, "llama": LLAMA}
LAYERS = {"checkpoint_activations": True}
CHOICES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "layers": LAYERS,
    "groups of three layers": LAYERS | {"checkpoint_num_layers": 3},
}


class Alive(TorchDispatchMode):
    """Knows the memory of every tensor that was made while it was on, without holding on to it."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in given:
                self._made.append((StorageWeakRef(leaf.untyped_storage()), leaf.untyped_storage().nbytes()))
        return made

    def bytes(self) -> int:
        """Returns what is alive [bytes]."""
        return sum(size for reference, size in self._made if not reference.expired())


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _alive_and_planned(path: Path, dtype: str) -> tuple[int, float]:
    deepspeed.init_distributed("gloo", verbose=False)
    run = load_config([path]).run
    sizes, again = run.parallel, run.training.checkpoint_activations
    context = ParallelContext.create(sizes.model_parallel_size, sizes.pipe_parallel_size, sizes.sequence_parallel)
    vocab = VocabSize(ROWS, ROWS)
    module = build_pipeline(run.model, vocab, sizes, context, seed=1, checkpointed=again).to(DTYPES[dtype])
    tokens_BS = torch.randint(ROWS, (SAMPLES, run.model.seq_length))
    module(tokens_BS)  # makes the rotary tables
    with Alive() as alive:
        logits_BSv = module(tokens_BS)
    held = alive.bytes() - logits_BSv.untyped_storage().nbytes()
    (stage,) = stages_of(run.model, sizes, ROWS)
    precision = run.training.precision.model_copy(update={"dtype": dtype})
    run = run.model_copy(update={"training": run.training.model_copy(update={"precision": precision})})
    batch = load_config([path]).batch(context.tensor_size)
    planned = rank_memory(run, batch, stage, ROWS, implementation_of(run, on_gpu=False))
    return held, planned.moments["loss"][ACTIVATIONS]


@pytest.mark.parametrize("dtype", covered(["fp32", "bf16"], ["fp32"]))
@pytest.mark.parametrize("choice", covered(list(CHOICES), ["nothing", "layers"]))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_stage_holds_what_is_planned(architecture: str, choice: str, dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yml"
    path.write_text(yaml.safe_dump(ARCHITECTURES[architecture] | LONGER | CHOICES[choice]))
    ((held, planned),) = run_distributed(_alive_and_planned, 1, path, dtype)
    assert held == planned
