"""Ranks: the model and the optimizer spread over them, and their start on this machine."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron.config.bounds import ElementCount, LayerCount, LocalCount, RankCount
from megatron.config.section import Key, Section


class ZeroConfig(Section):
    """ZeRO-1 data parallelism: each data-parallel rank keeps a slice of the optimizer state."""

    key_prefix = "zero_optimization."

    stage: Annotated[
        Literal[1],
        Key(
            difference="1 also when unset or 0: stage 0 clips wrongly across pipeline stages, and its checkpoints "
            "do not convert"
        ),
    ] = 1
    """ZeRO stage; 0 is raised to 1 and 2 or 3 are refused."""

    allgather_bucket_size: ElementCount = 500_000_000
    """Elements gathered at a time after the optimizer step [elements]."""

    reduce_bucket_size: ElementCount = 500_000_000
    """Elements reduced at a time [elements]."""


class ParallelConfig(Section):
    """Sizes of the tensor- and pipeline-parallel groups; the data-parallel size is what remains of the ranks."""

    model_parallel_size: RankCount = 1
    """Tensor-parallel ranks [ranks]."""

    pipe_parallel_size: Annotated[
        LayerCount, Key(difference="0 means 1; both train through DeepSpeed's pipeline engine")
    ] = 1
    """Pipeline stages [stages]."""

    pipe_partition_method: str = Field(
        default="type:transformer|mlp", max_length=200, pattern=r"^(uniform|parameters|type:.+)$"
    )
    """How layers are spread over stages: `uniform`, `parameters`, or `type:REGEX` of layer class names."""

    sequence_parallel: bool = False
    """Split the residual stream over the tensor-parallel ranks by sequence."""

    zero: ZeroConfig = ZeroConfig()
    """ZeRO-1 settings."""


class LaunchConfig(Section):
    """Ranks on this machine, and where they meet. Ranks started by torchrun, srun or mpirun ignore these."""

    num_gpus: Annotated[LocalCount | None, Key(difference="ranks on this machine, also on CPUs")] = None
    """Ranks that deepy.py starts on this machine [ranks]; None means every visible GPU, or one rank on a CPU."""

    master_port: Annotated[int | None, Key(difference="a free port when unset; NeoX's default is 29500")] = Field(
        default=None, ge=1, le=65535
    )
    """Port on which the ranks meet; None picks a free one."""
