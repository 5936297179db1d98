"""Keys that decide how work is spread over ranks, and how the ranks are started."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from pydantic import Field

from megatron.config.neox_entries import (
    UNSET,
    Conversion,
    Converted,
    Flat,
    Inert,
    MapsTo,
    RefusedError,
    Rejected,
    TableEntry,
    absent_flag,
    only,
)
from megatron.config.yaml.problems import YamlValue


def _zero_stage(value: YamlValue, flat: Flat) -> Converted:
    if value in (2, 3):
        raise RefusedError(
            f"ZeRO stage {value} does not work with the pipeline engine that trains every model here; use stage 1"
        )
    return 1 if value == 0 else value


def _pipe_parallel_size(value: YamlValue, flat: Flat) -> Converted:
    return 1 if value == 0 else value


def _switch_of(launcher: str) -> Callable[[YamlValue, Flat], Converted]:
    """Converts NeoX's switch for a launcher, which says nothing where `launcher` names one."""

    def convert(value: YamlValue, flat: Flat) -> Converted:
        return launcher if value is True and flat.get("launcher") is None else UNSET

    return convert


def _not_bf16(value: YamlValue, flat: Flat) -> str | None:
    if value is True and flat.get("communication_data_type", "fp32") != "fp32":
        return "it contradicts communication_data_type; leave one of them out"
    return None


_SET_BY_LAUNCHER = "set by whatever starts the ranks, never by a configuration"
_MEMORY_ONLY = "decides how gradients lie in memory or travel between ranks; nothing computed changes"
_ZERO_DERIVED = "NeoX overwrites it from zero_optimization"

PARALLEL_KEYS: dict[str, TableEntry] = {
    "pipe_parallel_size": Conversion(_pipe_parallel_size, accepts=Annotated[int, Field(ge=0, le=100_000)]),
    "is_pipe_parallel": Inert(bool, "NeoX overwrites it from pipe_parallel_size"),
    "zero_optimization.stage": Conversion(_zero_stage, accepts=Annotated[int, Field(ge=0, le=3)]),
    "zero_optimization.allgather_partitions": Inert(bool, _MEMORY_ONLY),
    "zero_optimization.reduce_scatter": Inert(bool, _MEMORY_ONLY),
    "zero_optimization.contiguous_gradients": Inert(bool, _MEMORY_ONLY),
    "zero_optimization.round_robin_gradients": Inert(bool, _MEMORY_ONLY),
    "zero_optimization.overlap_comm": Inert(bool, "gradients are always on the wire while the backward pass runs"),
    "zero_optimization.load_from_fp32_weights": Inert(bool, "a run goes on from its fp32 master weights"),
    "zero_optimization.elastic_checkpoint": absent_flag("checkpoints keep DeepSpeed's layout"),
    "zero_optimization.cpu_offload": absent_flag(
        "the optimizer state stays on the device", "use more data-parallel ranks"
    ),
    "zero_optimization.offload_optimizer": Rejected("the optimizer state stays on the device"),
    "zero_optimization.offload_param": Rejected("parameters stay on the device"),
    "zero_optimization.cpu_offload_param": absent_flag("parameters stay on the device"),
    "zero_stage": Rejected(_ZERO_DERIVED, "use zero_optimization.stage", (1,), int),
    "zero_reduce_scatter": Inert(bool, _MEMORY_ONLY),
    "zero_contiguous_gradients": Inert(bool, _MEMORY_ONLY),
    "zero_reduce_bucket_size": Rejected(_ZERO_DERIVED, "use zero_optimization.reduce_bucket_size", accepts=int),
    "zero_allgather_bucket_size": Rejected(_ZERO_DERIVED, "use zero_optimization.allgather_bucket_size", accepts=int),
    "deepspeed": Rejected("training always goes through DeepSpeed", harmless=(True,), accepts=bool),
    "deepspeed_extra_args": Rejected("it has no such key that is also one of NeoX's dictionary for DeepSpeed"),
    "data_types.grad_accum_dtype": Inert(
        str, "fp32 is what is always used", only("fp32", because="gradients are accumulated in fp32")
    ),
    "data_types": Rejected("gradients are accumulated in fp32"),
    "fp32_allreduce": Inert(bool, "gradients travel in fp32 unless communication_data_type says otherwise", _not_bf16),
    "prescale_gradients": absent_flag("gradients are averaged after their sum"),
    "gradient_predivide_factor": Rejected("gradients are averaged after their sum", harmless=(1,), accepts=float),
    "sparse_gradients": absent_flag("embedding gradients are dense"),
    "sparse_attention": Rejected("sparse attention is not implemented", accepts=dict),
    "compression_training": Rejected("DeepSpeed has removed it", accepts=dict),
    "elasticity": Rejected(
        "DeepSpeed has removed it", "give train_batch_size; accumulation follows the ranks", accepts=dict
    ),
    "autotuning": Rejected("DeepSpeed's autotuner is not supported", accepts=dict),
    "autotuning_run": Rejected("DeepSpeed's autotuner is not supported", accepts=str),
    "deepscale": absent_flag("DeepScale is DeepSpeed's name of 2020"),
    "deepscale_config": Inert(str, "only read with deepscale: true, which is refused"),
}

LAUNCH_KEYS: dict[str, TableEntry] = {
    "deepspeed_slurm": MapsTo("launch.launcher", _switch_of("slurm"), bool, meaning="True means launcher: slurm."),
    "deepspeed_mpi": MapsTo("launch.launcher", _switch_of("openmpi"), bool, meaning="True means launcher: openmpi."),
    "num_nodes": Conversion(lambda value, flat: UNSET if value == -1 else value, accepts=Annotated[int, Field(ge=-1)]),
    "force_multi": Inert(bool, "a hostfile is always followed, also one of a single machine"),
    "detect_nvlink_pairs": absent_flag("devices are used in their order", "set CUDA_VISIBLE_DEVICES"),
    "distributed_backend": Inert(
        str,
        "NCCL on GPUs and gloo on CPUs",
        only("nccl", "gloo", because="the backend follows the device: NCCL on GPUs, gloo on CPUs"),
    ),
    "lazy_mpu_init": absent_flag("groups are made when a run starts"),
    "user_script": Rejected("the script is the first argument of deepy.py"),
    "config_files": Rejected("the files are arguments of deepy.py"),
    "world_size": Rejected(_SET_BY_LAUNCHER, accepts=int),
    "rank": Rejected(_SET_BY_LAUNCHER, accepts=int),
    "local_rank": Rejected(_SET_BY_LAUNCHER, accepts=int),
    "global_num_gpus": Inert(int, "whatever starts the ranks counts them; num_gpus starts as many here", warn=True),
    "do_train": Inert(bool, "NeoX overwrites it; train_iters decides"),
    "do_valid": Inert(bool, "NeoX overwrites it; eval_iters decides"),
    "do_test": Inert(bool, "NeoX overwrites it; eval_iters decides"),
}
