"""Ranks: the model and the optimizer spread over them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron.config.bounds import ElementCount, LayerCount, RankCount
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

    reduce_bucket_size: Annotated[ElementCount, Key(difference="at most 8,388,608, whatever more is given")] = (
        500_000_000
    )
    """Gradients summed over data-parallel ranks at a time, as the backward pass completes them [elements]."""


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

    communication_data_type: Annotated[
        Literal["fp32", "bf16"], Key(difference="fp32 when unset, whatever the precision")
    ] = "fp32"
    """Number format in which gradients travel between data-parallel ranks, who add them in it."""

    zero: ZeroConfig = ZeroConfig()
    """ZeRO-1 settings."""
