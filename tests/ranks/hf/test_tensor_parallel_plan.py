"""transformers' tensor parallelism, by the plan that an export declares, against the model on one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import megatron.hf  # noqa: F401 - registers TokenFormer
from tests.helpers.distributed import run_on_new_ranks
from tests.helpers.transformers_pairs import VARIANTS, pair, random_tokens


def _same_as_alone(folder: str) -> dict[str, Any]:
    """On a rank, in float64: differences to the whole model of logits and gradients, and both's greedy tokens."""
    parallel = DistributedConfig(tp_size=2)
    split = AutoModelForCausalLM.from_pretrained(folder, distributed_config=parallel, dtype=torch.float64)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokens = random_tokens(2, 12)
    logits = [model(tokens).logits for model in (split, whole)]
    for found in logits:
        F.cross_entropy(found[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    differences = [float((logits[0] - logits[1]).detach().abs().max())]
    for here, there in zip(split.parameters(), whole.parameters(), strict=True):
        gradient = here.grad.full_tensor() if isinstance(here.grad, DTensor) else here.grad
        differences.append(float((gradient - there.grad).abs().max() / there.grad.abs().max()))
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    generated = [model.generate(tokens, **settings).tolist() for model in (split, whole)]
    sharded = [name for name, parameter in split.named_parameters() if isinstance(parameter, DTensor)]
    return {"differences": differences, "generated": generated, "sharded": sharded}


@pytest.mark.parametrize(
    "variant", ["grown", *(pytest.param(name, marks=pytest.mark.full) for name in ("softmax", "untied"))]
)
def test_two_ranks_compute_what_one_computes(variant: str, tmp_path: Path) -> None:
    pair(VARIANTS[variant], scale=0.3)[1].save_pretrained(tmp_path)
    for found in run_on_new_ranks(_same_as_alone, 2, str(tmp_path)):
        assert max(found["differences"]) < 1e-9
        assert found["generated"][0] == found["generated"][1]
        tokens = [name for name in found["sharded"] if name.endswith("_tokens")]
        assert len(tokens) == 2 * 5 * 2  # layers, Pattentions, keys and values: all of them are split
