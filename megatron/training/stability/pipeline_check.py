"""Compares DeepSpeed's pipeline with plain torch, on two ranks of its own, which this file also is the program of.

Two stages of one linear layer each take two steps of gradient descent, whose updates, unlike Adam's, are in proportion
to the gradients. `check_pipelines` starts the ranks and judges what they have measured.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.errors import EnvironmentSetupError

STAGES = 2
ACCUMULATION = 4
MICRO_BATCH, WIDTH, STEPS = 2, 8, 2
TOLERANCES = {"fp32": 1e-4, "bf16": 0.1}
"""Largest difference of a stage's update from plain torch's in float64, as a share of its norm. A stage whose gradients
are divided by the accumulation once more is off by 0.75."""
TIMEOUT_SECONDS = 300
POLL_SECONDS = 0.1
CHECKOUT = Path(__file__).resolve().parents[3]


def check_pipelines() -> dict[str, float]:
    """Runs the comparison and returns the largest difference of a stage, by number format.

    Raises EnvironmentSetupError when DeepSpeed computes something else, or cannot be run.
    """
    with tempfile.TemporaryDirectory(prefix="pipeline-check-") as folder:
        _run_ranks(Path(folder))
        measured = [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(STAGES)]
    for precision, tolerance in TOLERANCES.items():
        for stage in range(STAGES):
            # Not >, which a NaN would pass.
            if not measured[stage][precision] <= tolerance:
                raise EnvironmentSetupError(
                    f"it trains pipelines wrongly: stage {stage} of {STAGES} ends {measured[stage][precision]:.0%} of "
                    f"its way from where plain torch does (accumulation {ACCUMULATION}, {precision})"
                )
    return {precision: max(stage[precision] for stage in measured) for precision in TOLERANCES}


def _run_ranks(folder: Path) -> None:
    """Runs both ranks to their end. Raises EnvironmentSetupError, with what one printed last, when it fails."""
    # -P: a folder `megatron` in the user's current folder must not come before the checkout's.
    command = [sys.executable, "-P", "-m", __name__]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(STAGES),
    }
    outputs = [folder / f"rank{rank}.log" for rank in range(STAGES)]
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank, output in enumerate(outputs):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with output.open("wb") as file:
                words = [*command, str(rank), str(folder)]
                ranks.append(subprocess.Popen(words, env=environment | place, stdout=file, stderr=subprocess.STDOUT))
        _wait_for(ranks, outputs)
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def _wait_for(ranks: Sequence[subprocess.Popen[bytes]], outputs: Sequence[Path]) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while any(rank.poll() is None for rank in ranks):
        if time.monotonic() > deadline:
            raise EnvironmentSetupError(f"two stages of it were not done after {TIMEOUT_SECONDS} s")
        if any(rank.poll() for rank in ranks):
            break
        time.sleep(POLL_SECONDS)
    for rank, output in zip(ranks, outputs, strict=True):
        if rank.poll():
            said = output.read_text(errors="replace").strip().splitlines() or ["nothing was printed"]
            raise EnvironmentSetupError(f"two stages of it could not be run ({said[-1]})")


def _measure(rank: int, folder: Path) -> None:
    """Writes this stage's differences from plain torch, by number format."""
    from torch import distributed
    from torch.distributed import FileStore  # type: ignore[attr-defined]

    from megatron.training.stability.deepspeed_patches import join_process_group

    store = FileStore(str(folder / "meeting"), STAGES)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=STAGES)
    join_process_group()
    differences = {precision: stage_difference(precision) for precision in TOLERANCES}
    (folder / f"rank{rank}.json").write_text(json.dumps(differences))
    distributed.barrier()
    distributed.destroy_process_group()


def stage_difference(precision: str) -> float:
    """Returns how far the weights of this rank's stage end from those of plain torch, as a share of their way.

    Collective, on as many ranks as there are stages.
    """
    import deepspeed
    import torch
    from torch import nn

    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())
    batches = torch.randn(STEPS, ACCUMULATION, 2, MICRO_BATCH, WIDTH, dtype=torch.float64)
    reference = copy.deepcopy(whole).double()
    before = {name: weight.detach().clone() for name, weight in reference.named_parameters()}
    descent = torch.optim.SGD(reference.parameters(), lr=1.0)
    for step in batches:
        descent.zero_grad()
        for inputs, wanted in step:
            torch.autograd.backward(nn.functional.mse_loss(reference(inputs), wanted) / ACCUMULATION)
        descent.step()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    module = deepspeed.PipelineModule(
        list(whole), num_stages=STAGES, loss_fn=nn.functional.mse_loss, partition_method="uniform"
    )
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "pipeline": {"use_reentrant": False, "pipe_partitioned": False, "grad_partitioned": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": precision == "bf16"},
    }
    descent = torch.optim.SGD(module.parameters(), lr=1.0)
    engine, _, _, _ = deepspeed.initialize(model=module, optimizer=descent, config=config)
    for step in batches:
        engine.train_batch(iter([(inputs.to(dtype), wanted.to(dtype)) for inputs, wanted in step]))
    after = dict(reference.named_parameters())
    way = torch.cat([(after[name] - before[name]).flatten() for name, _ in module.named_parameters()])
    rest = torch.cat([(weight.double() - after[name]).flatten() for name, weight in module.named_parameters()])
    return float(rest.norm() / way.norm())


if __name__ == "__main__":
    _measure(int(sys.argv[1]), Path(sys.argv[2]))
