"""Writes layers in DeepSpeed's universal form, from which a run of any layout and precision takes its share.

mp_rank_00_model_states.pt                    the engine's counters, schedule
zero/optimizer_state.pt                       what is the same for all parameters
zero/<name>/{fp32,exp_avg,exp_avg_sq,step}.pt one parameter, whole; the moments have the optimizer's own names

DeepSpeed's own converter is told the split of parameters by patterns of names, and unpickles without restraint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron.checkpointing.states.layer_state import LayerState
from megatron.checkpointing.states.parameter_layout import LayerLayout, ParallelSizes
from megatron.checkpointing.states.read_zero_files import COUNTERS, MASTER, EngineState
from megatron.checkpointing.states.stage_parameters import stage_parameters
from megatron.checkpointing.store.manifest import FileEntry
from megatron.checkpointing.store.tensor_files import write_tensors
from megatron.config.sections.run_config import RunConfig
from megatron.model.causal_lm import VocabSize

ENGINE_FILE = "mp_rank_00_model_states.pt"
OPTIMIZER_FILE = "zero/optimizer_state.pt"


class UniversalFiles:
    """The files of a universal form on their way; `written` has those that are done, by their path in the folder."""

    def __init__(self, folder: Path, config: RunConfig, vocab: VocabSize, engine: EngineState) -> None:
        """Makes the folder, and writes what is not of one parameter."""
        self.folder = folder
        self.written: dict[str, FileEntry] = {}
        (whole_model,) = stage_parameters(config, vocab, ParallelSizes())
        self._engine_names = {parameter.global_name: parameter.engine_name for parameter in whole_model}
        (folder / "zero").mkdir(parents=True)
        counters = {key: engine.counters[key] for key in COUNTERS}
        self._write(ENGINE_FILE, counters | {"dp_world_size": 1, "mp_world_size": 1})
        groups: list[dict[str, Any]] = [{}, {}]
        version = {"ds_version": counters["ds_version"]}
        self._write(OPTIMIZER_FILE, dict(engine.loss_scale) | version | {"param_groups": groups})

    def add(self, layer: LayerState, layout: LayerLayout) -> None:
        """Writes one layer's parameters; `layout` says how they split over tensor-parallel ranks."""
        for local, parameter in layer.parameters.items():
            folder = parameter_folder(Path(), self._engine_names[layout.global_name(local)])
            (self.folder / folder).mkdir()
            dim = layout.parameters[local].shard_dim
            for key, tensor in ({MASTER: parameter.master} | dict(parameter.moments)).items():
                if tensor is not None:
                    # A copy: torch.save writes all of the memory that a view is of.
                    content = {"param": tensor.clone()} | ({} if dim is None else {"cat_dim": dim})
                    self._write(f"{folder}/{key}.pt", content)
            if parameter.step is not None:
                self._write(f"{folder}/step.pt", torch.tensor(parameter.step))

    def _write(self, name: str, content: Any) -> None:
        self.written[name] = write_tensors(content, self.folder / name)


def parameter_folder(universal: Path, engine_name: str) -> Path:
    """Returns the folder of a parameter in the universal form."""
    return universal / "zero" / engine_name
