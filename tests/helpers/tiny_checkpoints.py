"""Checkpoints of tiny models in any layout, written without ranks, with weights that no initialization has."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from megatron.checkpointing.states.layer_state import LayerState, ParameterState
from megatron.checkpointing.states.parameter_layout import ParallelSizes, layer_layouts
from megatron.checkpointing.states.write_states import RunHeader, write_states
from megatron.checkpointing.store.checkpoint import Checkpoint, read_checkpoint
from megatron.config.load_config import load_config
from megatron.config.sections.run_config import RunConfig
from megatron.model.causal_lm import LocalCausalLM, VocabSize, build_local
from megatron.mpu.context import ParallelContext
from megatron.mpu.parameters import DTYPES, local_shard, parameter_spec
from tests.helpers.configs import GPT2, LLAMA, PYTHIA, TOKENFORMER

VOCAB = VocabSize(actual=512, padded=600)
"""CharLevelTokenizer's ids, padded to a multiple of 100."""

MODELS: dict[str, dict[str, Any]] = {
    **{theta: TOKENFORMER | {"norm_activation_type": theta} for theta in ("l2_norm_gelu", "gelu_l2_norm", "softmax")},
    "pythia": PYTHIA,
    "gpt2": GPT2,
    "llama": LLAMA,
}


def write_yaml(folder: Path, settings: dict[str, Any]) -> Path:
    """The YAML of a tiny run whose vocabulary needs padding."""
    path = folder / "run.yml"
    path.write_text(yaml.safe_dump({"make_vocab_size_divisible_by": 100, "save": str(folder / "run")} | settings))
    return path


def read_run(config: Path) -> RunConfig:
    """The configuration of a YAML file."""
    return load_config([config]).run


def make_checkpoint(config: Path, *, tensor: int = 1, pipe: int = 1, iteration: int = 7) -> Checkpoint:
    """Writes the checkpoint that a run of this layout would have after `iteration` steps of 8 samples, without the
    optimizer's state; its weights are those of `set_unusual_weights`."""
    run = load_config([config], [f"model_parallel_size={tensor}", f"pipe_parallel_size={pipe}"]).run
    state = replace(RunHeader.new(VOCAB.actual, {}).state, iteration=iteration, consumed_train_samples=8 * iteration)
    assert run.checkpoint.save is not None
    header = RunHeader(state, run_id="test", versions={"torch": torch.__version__})
    folder = write_states(_layers(run), run, ParallelSizes(tensor, pipe), Path(run.checkpoint.save), header)
    return read_checkpoint(folder)


def _layers(run: RunConfig) -> Iterator[LayerState]:
    weights = whole_model(run).to(DTYPES[run.training.precision.dtype]).state_dict()
    for layout in layer_layouts(run.model, VOCAB):
        own = {local: ParameterState(weights[layout.global_name(local)]) for local in layout.parameters}
        yield LayerState(layout.name, own)


def export(checkpoint: Checkpoint, output: Path, **options: Any) -> Path:
    """Exports the checkpoint by its own configuration to the folder `output`; returns it."""
    # Imports transformers.
    from megatron.hf.export_checkpoint import ExportOptions, export_checkpoint

    export_checkpoint(checkpoint, checkpoint.config, output, ExportOptions(**options))
    return output


def set_unusual_weights(named: Iterable[tuple[str, nn.Parameter]], context: ParallelContext) -> None:
    """Set this rank's share of weights that depend on the names alone; norms and biases are not at 1 and 0."""
    with torch.no_grad():
        for name, parameter in named:
            spec = parameter_spec(parameter)
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
            full = 0.2 * torch.randn(spec.full_shape, generator=torch.Generator().manual_seed(seed))
            full += 1.0 if name.endswith("norm.weight") else 0.0
            parameter.copy_(local_shard(full, spec.shard_dim, context))


def whole_model(run: RunConfig) -> LocalCausalLM:
    """The model that every layout's checkpoint holds, made without a checkpoint."""
    model = build_local(run.model, VOCAB, seed=None)
    set_unusual_weights(model.named_parameters(), ParallelContext.single())
    return model.eval()


def tokens() -> Tensor:
    """Token ids [3, 16] of CharLevelTokenizer."""
    return torch.randint(VOCAB.actual, (3, 16), generator=torch.Generator().manual_seed(4))
