"""The DeepSpeed configuration of a run (DeepSpeed 0.19.8)."""

from __future__ import annotations

from typing import Any

from megatron.config.sections.run_config import RunConfig
from megatron.config.sections.training import BatchConfig, PrecisionConfig


def deepspeed_config(run: RunConfig, batch: BatchConfig) -> dict[str, Any]:
    """Builds the configuration that `deepspeed.initialize` is given.

    Always ZeRO stage 1: stage 0 clips wrongly across pipeline stages, and its checkpoints do not convert. Gradients are
    accumulated in fp32 in every precision. Their reduction, the optimizer and the schedule are the caller's.
    """
    zero = run.parallel.zero
    return {
        "train_batch_size": batch.global_batch_size,
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_accumulation_steps": batch.gradient_accumulation_steps,
        "gradient_clipping": run.training.gradient_clipping,
        "zero_optimization": {
            "stage": zero.stage,
            "allgather_bucket_size": zero.allgather_bucket_size,
            "overlap_comm": False,
        },
        # The pipeline engine recomputes wrongly under reentrant checkpointing: silently so with a single stage.
        # Sequence-parallel activations differ between tensor ranks, so stages must not send each other a share of them.
        "pipeline": {"use_reentrant": False, "pipe_partitioned": False, "grad_partitioned": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "wall_clock_breakdown": False,
        **precision_section(run.training.precision),
    }


def precision_section(precision: PrecisionConfig) -> dict[str, Any]:
    """Builds the part of the configuration that decides the number format."""
    match precision.dtype:
        case "bf16":
            return {"bf16": {"enabled": True}}
        case "fp16":
            return {
                "fp16": {
                    "enabled": True,
                    "loss_scale": precision.loss_scale,
                    "initial_scale_power": precision.initial_scale_power,
                    "loss_scale_window": precision.loss_scale_window,
                    "hysteresis": precision.hysteresis,
                    "min_loss_scale": precision.min_loss_scale,
                }
            }
    return {}
