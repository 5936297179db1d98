"""The planner's stages are those into which DeepSpeed divides the same model, parameter by parameter."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron.config.load_config import load_config
from megatron.config.model_size import count_parameters
from megatron.errors import ConfigError
from megatron.model.causal_lm import VocabSize, layer_entries
from megatron.model.pipeline import layer_specs, stage_bounds
from megatron.mpu.context import ParallelContext
from megatron.planner.stages import stages_of
from tests.helpers.configs import GPT2, LLAMA, PYTHIA, TOKENFORMER

ROWS = 640
SETTINGS: dict[str, dict[str, Any]] = {"tokenformer": TOKENFORMER, "pythia": PYTHIA, "gpt2": GPT2, "llama": LLAMA}


@pytest.mark.parametrize("method", ["type:transformer|mlp", "uniform", "parameters", "type:head|embed"])
@pytest.mark.parametrize("name", SETTINGS)
def test_stages_are_those_of_deepspeed(name: str, method: str, tmp_path: Path) -> None:
    path, compared = tmp_path / "run.yml", 0
    for layers in (1, 2, 5, 7):
        path.write_text(yaml.safe_dump(SETTINGS[name] | {"num_layers": layers, "pipe_partition_method": method}))
        run = load_config([path]).run
        entries = layer_entries(run.model, VocabSize(ROWS, ROWS), ParallelContext.single())
        specs = layer_specs(entries, run.model)
        with torch.device("meta"):
            counts = [sum(p.numel() for p in entry.build().parameters()) for entry in entries]
        for stages in range(1, layers + 1):
            parallel = run.parallel.model_copy(update={"pipe_parallel_size": stages})
            try:
                bounds = stage_bounds(specs, method, stages)
            except ConfigError:
                with pytest.raises(ConfigError, match="without parameters"):
                    stages_of(run.model, parallel, ROWS)
                continue
            found = stages_of(run.model, parallel, ROWS)
            whole = run.model.tie_embeddings and stages == 1
            expected = [sum(counts[start:stop]) for start, stop in pairwise(bounds)]
            assert [stage.parameters for stage in found] == [expected[0] - counts[-1] if whole else e for e in expected]
            compared += 1
    assert compared > 3


@pytest.mark.parametrize("name", SETTINGS)
def test_one_stage_has_all_parameters_and_tensor_ranks_a_share(name: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yml"
    path.write_text(yaml.safe_dump(SETTINGS[name] | {"model_parallel_size": 2}))
    run = load_config([path]).run
    (whole,) = stages_of(run.model, run.parallel.model_copy(update={"model_parallel_size": 1}), ROWS)
    (half,) = stages_of(run.model, run.parallel, ROWS)
    assert whole.parameters == count_parameters(run.model, ROWS)
    # Norms, biases of outputs to the residual stream and learned positions are on both ranks.
    replicated = 2 * half.parameters - whole.parameters
    positions = run.model.max_position_embeddings * run.model.hidden_size if run.model.pos_emb == "learned" else 0
    assert positions <= replicated <= positions + whole.vectors
