"""Keys that decide what a run leaves behind and shows: checkpoints, logs, monitoring, generated text."""

from __future__ import annotations

from typing import Any

from megatron.config.neox_entries import Inert, MapsTo, Rejected, TableEntry, absent_flag

_COMET = "only read with use_comet: true, which is refused"
_NOISE_SCALE = "only read with log_gradient_noise_scale: true, which is refused"
_DEEPSPEED_MONITOR = "DeepSpeed's own monitors are not used"

CHECKPOINT_KEYS: dict[str, TableEntry] = {
    "save_interval": MapsTo("checkpoint.checkpoint_factor", difference="NeoX's old name of checkpoint_factor"),
    "save_iters": Rejected("NeoX computes it", "use extra_save_iters", accepts=list),
    "no_load_rng": Inert(
        bool, "checkpoints hold no generator states: dropout is a function of the seed, the step and the rank"
    ),
    "no_save_optim": absent_flag("a checkpoint is always complete, so that a run can go on from it"),
    "no_save_rng": absent_flag("a checkpoint is always complete, so that a run can go on from it"),
    "load_module_strict": Rejected("every tensor of a checkpoint must fit", harmless=(True,), accepts=bool),
    "checkpoint_validation_with_forward_pass": absent_flag("files are checked by size and hash instead"),
    "checkpoint": Rejected("DeepSpeed's checkpoint options are set by this project"),
    "s3_path": MapsTo(
        "checkpoint.save_remote", difference="checkpoints are whole there or not at all, and stay in save"
    ),
    "s3_chunk_size": Inert(int, "the store's package chooses the size of the parts that it sends"),
    "eval_ckpt": Inert(str, "only the TokenFormer release's eval.py reads it", warn=True),
    "adlr_autoresume": Inert(
        bool, "NeoX resumes through a library of NVIDIA's clusters; auto_resume: true does it here", warn=True
    ),
    "adlr_autoresume_interval": Inert(int, "only read with adlr_autoresume"),
}

MONITOR_KEYS: dict[str, TableEntry] = {
    "wandb_init_all_ranks": absent_flag("one rank records the run"),
    "use_comet": absent_flag("Comet is not supported", "use tensorboard_dir or use_wandb"),
    "comet_experiment": Inert(Any, _COMET),
    "comet_experiment_name": Inert(str, _COMET),
    "comet_others": Inert(dict, _COMET),
    "comet_project": Inert(str, _COMET),
    "comet_tags": Inert(list, _COMET),
    "comet_workspace": Inert(str, _COMET),
    "tensorboard": Rejected(_DEEPSPEED_MONITOR, "use tensorboard_dir", accepts=dict),
    "wandb": Rejected(_DEEPSPEED_MONITOR, "use use_wandb", accepts=dict),
    "csv_monitor": Inert(dict, f"{_DEEPSPEED_MONITOR}; metrics.jsonl in log_dir has the numbers", warn=True),
    "steps_per_print": Inert(int, "DeepSpeed's own progress lines are off; log_interval decides"),
    "wall_clock_breakdown": Inert(
        bool, "only prints DeepSpeed's timers, and slows the run to do so; log_part_times records times of parts"
    ),
    "log_grad_norm": Inert(bool, "the gradient norm is always recorded"),
    "log_param_norm": absent_flag("parameter norms are not recorded"),
    "log_grad_pct_zeros": absent_flag("shares of zero gradients are not recorded"),
    "log_optimizer_states": absent_flag("optimizer states are not recorded"),
    "log_gradient_noise_scale": absent_flag("the gradient noise scale is not measured"),
    "gradient_noise_scale_n_batches": Inert(int, _NOISE_SCALE),
    "gradient_noise_scale_cpu_offload": Inert(bool, _NOISE_SCALE),
    "memory_profiling_path": Inert(str, "snapshots go to the folder `profile` of the run's folder", warn=True),
    "comms_logger.prof_all": Inert(bool, "all operations are counted"),
    "comms_logger.prof_ops": Inert(list, "all operations are counted", warn=True),
    "comms_logger.verbose": Inert(bool, "operations are not logged one by one", warn=True),
    "comms_logger.debug": Inert(bool, "a trace has the caller of each operation: profile: true"),
    "peak_theoretical_tflops": Inert(
        float, "utilization is reported for devices whose peak is known, and against that", warn=True
    ),
    "git_hash": Inert(str, "the commit is found out by the run itself"),
    "dump_state": absent_flag("DeepSpeed's state is not dumped", "use --print-effective-config"),
    "flops_profiler": Inert(dict, "DeepSpeed's profiler, which prints alone, is not used", warn=True),
}

GENERATION_KEYS: dict[str, TableEntry] = {
    "precompute_model_name": Rejected("activations are not precomputed"),
    "serve_model_weights": absent_flag("weights are not served over the network"),
    "weight_server_port": Inert(Any, "only read with serve_model_weights: true, which is refused"),
}
