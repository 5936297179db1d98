"""Rewrites a checkpoint for another layout and precision, in one process without an engine."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler
from deepspeed.runtime.precision_config import DeepSpeedFP16Config

from megatron.checkpointing.states.parameter_layout import LayerLayout, fit_vocabulary, layer_layouts, split
from megatron.checkpointing.states.read_optimizer import OptimizerFiles
from megatron.checkpointing.states.same_model import model_differences, require_same_vocabulary
from megatron.checkpointing.states.weights import checkpoint_layouts, layer_file
from megatron.checkpointing.states.weights_only import is_weights_only
from megatron.checkpointing.states.write_optimizer import Common, Layout, StageParameter, write_stage
from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.checkpointing.store.manifest import FileEntry
from megatron.checkpointing.store.publish import begin, complete
from megatron.checkpointing.store.safe_load import load_tensors
from megatron.checkpointing.store.tensor_files import write_tensors
from megatron.config.deepspeed_json import precision_section
from megatron.config.sections.run_config import RunConfig
from megatron.config.sections.training import PrecisionConfig
from megatron.data.tokenizer import padded_vocab_size
from megatron.errors import CheckpointError
from megatron.model.causal_lm import LayerEntry, VocabSize, from_engine_name, layer_entries
from megatron.model.number_formats import DTYPES
from megatron.model.pipeline import layer_specs, stage_bounds
from megatron.mpu.context import ParallelContext
from megatron.mpu.parameters import ParameterSpec, parameter_spec

logger = logging.getLogger(__name__)


def reshape(source: Checkpoint, config: RunConfig, data_size: int, output: Path) -> Path:
    """Write `output`/global_stepN and `latest`: what `source` holds, as a run of `config` on `data_size` data-parallel
    ranks would have written it. Returns the checkpoint's path.

    Only parallel sizes, precision and padding of the vocabulary are taken from `config`. A pipeline stage is in memory
    at a time. Raises CheckpointError when the model is another, or a file is missing, damaged or unsafe.
    """
    differences = model_differences(source.config.model, config.model)
    if differences:
        raise CheckpointError(f"{source.path} holds another model than the configuration: {'; '.join(differences)}.")
    if is_weights_only(source):
        raise CheckpointError(f"{source.path} holds weights alone, which every layout loads as they are.")
    vocab = VocabSize(source.state.vocab_size, padded_vocab_size(config.model, source.state.vocab_size))
    require_same_vocabulary(source, vocab, padding_is_masked=config.model.mask_padded_vocab)
    sizes = config.parallel
    layout = Layout(sizes.model_parallel_size, sizes.pipe_parallel_size, data_size, config.training.precision)
    files = OptimizerFiles(source)
    temporary = begin(output, source.state.iteration)
    try:
        written = _write(temporary, source, files, config, layout, vocab)
        state = replace(
            source.state,
            tensor_parallel_size=layout.tensor,
            pipe_parallel_size=layout.pipe,
            data_parallel_size=layout.data,
            padded_vocab_size=vocab.padded,
        )
        manifest = source.manifest
        return complete(
            temporary, written, state, _with_layout(source.config, config), run_id=manifest.run_id,
            versions=manifest.versions,
        )  # fmt: skip
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone by then, under its own name, unless something failed


def _write(
    folder: Path, source: Checkpoint, files: OptimizerFiles, config: RunConfig, layout: Layout, vocab: VocabSize
) -> dict[str, FileEntry]:
    model = config.model
    theirs = {read.index: read for read in checkpoint_layouts(source)}
    ours = {write.index: write for write in layer_layouts(model, vocab)}
    common = _common(source, files, layout.precision)
    entries = layer_entries(model, vocab, ParallelContext(tensor_size=layout.tensor))
    bounds = stage_bounds(layer_specs(entries, model), config.parallel.pipe_partition_method, layout.pipe)
    written: dict[str, FileEntry] = {}
    for stage, (start, stop) in enumerate(pairwise(bounds)):
        logger.info("writing stage %d of %d", stage + 1, layout.pipe)
        parameters = []
        # A tied head has no layer of its own: its weight is the embedding's.
        for index, names in _stage_names(entries, start, stop, tied=model.tie_embeddings):
            states = _fitted(files.read_layer(theirs[index]), ours[index], vocab)
            if start <= index < stop:
                written |= _write_layer(folder, ours[index], states, layout)
            for engine_name, spec in names.items():
                parameters.append(StageParameter(engine_name, spec, states[from_engine_name(engine_name, model)]))
        written |= write_stage(folder, stage, parameters, layout, common)
    return written


def _stage_names(
    entries: Sequence[LayerEntry], start: int, stop: int, *, tied: bool
) -> Iterator[tuple[int, dict[str, ParameterSpec]]]:
    """(owning layer, parameters by their name in the engine), in the order of DeepSpeed's module: tied ones first."""
    with torch.device("meta"):
        built = {index: entries[index].build().named_parameters() for index in range(start, stop)}
    named = {index: {name: parameter_spec(p) for name, p in parameters} for index, parameters in built.items()}
    if tied:
        shared = [named.pop(index) for index in (0, len(entries) - 1) if index in named]
        if shared:
            yield 0, {f"tied_modules.embedding.{name}": spec for name, spec in shared[0].items()}
    for index, parameters in named.items():
        if parameters:
            yield index, {f"{index}.{name}": spec for name, spec in parameters.items()}


def _fitted(
    states: Mapping[str, Mapping[str, torch.Tensor]], ours: LayerLayout, vocab: VocabSize
) -> dict[str, dict[str, torch.Tensor]]:
    specs = {ours.global_name(name): spec for name, spec in ours.parameters.items()}
    return {
        name: {key: fit_vocabulary(tensor, specs[name], vocab.actual) for key, tensor in parameter.items()}
        for name, parameter in states.items()
    }


def _write_layer(
    folder: Path, ours: LayerLayout, states: Mapping[str, Mapping[str, torch.Tensor]], layout: Layout
) -> dict[str, FileEntry]:
    """The weights that are computed with; they are the optimizer's, rounded."""
    written = {}
    for tensor_rank in range(layout.tensor):
        shares = {
            name: split(states[ours.global_name(name)]["fp32"], spec, layout.tensor)[tensor_rank]
            for name, spec in ours.parameters.items()
        }
        file = layer_file(folder, ours.index, tensor_rank)
        # Copies, for torch.save writes all of what a view is of.
        content = {name: share.to(DTYPES[layout.precision.dtype], copy=True) for name, share in shares.items()}
        written[file.name] = write_tensors({name: share.contiguous() for name, share in content.items()}, file)
    return written


def _common(source: Checkpoint, files: OptimizerFiles, precision: PrecisionConfig) -> Common:
    engine: dict[str, Any] = load_tensors(source.path / "mp_rank_00_model_states.pt")
    scale = files.loss_scale
    if source.config.training.precision.dtype != precision.dtype:
        scale = {} if precision.dtype == "bf16" else _initial_loss_scale(precision)
    return Common(
        engine={key: value for key, value in engine.items() if key != "ds_config"},
        hyperparameters=files.hyperparameters,
        steps=files.steps,
        clip_grad=files.clip_grad,
        loss_scale=scale,
    )


def _initial_loss_scale(precision: PrecisionConfig) -> dict[str, Any]:
    settings = DeepSpeedFP16Config(**precision_section(precision).get("fp16", {}))
    scaler = CreateLossScaler(
        dtype=DTYPES[precision.dtype],
        static_loss_scale=settings.loss_scale,
        dynamic_scaling=settings.loss_scale == 0,
        dynamic_loss_args=settings.dynamic_loss_scale_args(),
    )
    return {"loss_scaler": scaler, "dynamic_loss_scale": scaler.dynamic, "overflow": False}


def _with_layout(theirs: RunConfig, config: RunConfig) -> RunConfig:
    """The configuration of the run that wrote the source, in the layout that it has now."""
    return theirs.model_copy(
        update={
            "parallel": config.parallel,
            "training": theirs.training.model_copy(update={"precision": config.training.precision}),
            "model": theirs.model.model_copy(update={"padded_vocab_size": config.model.padded_vocab_size}),
        }
    )
