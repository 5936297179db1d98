"""Keys that decide what a run leaves behind and shows: checkpoints, logs, monitoring, generated text."""

from __future__ import annotations

from megatron.config.json_schema import ANYTHING, BOOL, DICTIONARY, LIST, TEXT, WHOLE
from megatron.config.neox.keys.entries import Entry, Inert, MapsTo, Rejected, absent_flag

_COMET = "only read with use_comet: true, which is refused"
_NOISE_SCALE = "only read with log_gradient_noise_scale: true, which is refused"
_PROFILE = "only read with profile: true, which is refused"
_DEEPSPEED_MONITOR = "DeepSpeed's own monitors are not used"

CHECKPOINT_KEYS: dict[str, Entry] = {
    "save": MapsTo("checkpoint.save"),
    "load": MapsTo("checkpoint.load", difference="must hold a checkpoint; NeoX starts from step 0 when it does not"),
    "auto_resume": MapsTo("checkpoint.auto_resume", difference="not a NeoX key; there, load equal to save"),
    "checkpoint_factor": MapsTo("checkpoint.checkpoint_factor"),
    "save_interval": MapsTo("checkpoint.checkpoint_factor", difference="NeoX's old name of checkpoint_factor"),
    "checkpoint_scale": MapsTo("checkpoint.checkpoint_scale"),
    "extra_save_iters": MapsTo("checkpoint.extra_save_iters"),
    "save_iters": Rejected("NeoX computes it", "use extra_save_iters", accepts=LIST),
    "async_save": MapsTo("checkpoint.async_save", difference="not a NeoX key; Megatron-LM has an option of this name"),
    "keep_last_n_checkpoints": MapsTo("checkpoint.keep_last_n_checkpoints"),
    "keep_extra_save_iters": MapsTo("checkpoint.keep_extra_save_iters", difference="not a NeoX key"),
    "keep_every_n_iters": MapsTo("checkpoint.keep_every_n_iters", difference="not a NeoX key"),
    "verify_checkpoint": MapsTo("checkpoint.verify_checkpoint", difference="not a NeoX key; there, nothing is checked"),
    "allow_unsafe_load": MapsTo(
        "checkpoint.allow_unsafe_load", difference="not a NeoX key; there, every file is unpickled"
    ),
    "allow_changed_data": MapsTo("checkpoint.allow_changed_data", difference="not a NeoX key; there, nobody notices"),
    "iteration": MapsTo("checkpoint.iteration"),
    "finetune": MapsTo("checkpoint.finetune"),
    "no_load_optim": MapsTo("checkpoint.no_load_optim"),
    "no_load_rng": Inert(
        BOOL, "checkpoints hold no generator states: dropout is a function of the seed, the step and the rank"
    ),
    "no_save_optim": absent_flag("a checkpoint is always complete, so that a run can go on from it"),
    "no_save_rng": absent_flag("a checkpoint is always complete, so that a run can go on from it"),
    "pretrain_partial_init": MapsTo("checkpoint.pretrain_partial_init", difference="TokenFormer release"),
    "load_module_strict": Rejected("every tensor of a checkpoint must fit", harmless=(True,), accepts=BOOL),
    "checkpoint_validation_with_forward_pass": absent_flag("files are checked by size and hash instead"),
    "checkpoint": Rejected("DeepSpeed's checkpoint options are set by this project"),
    "s3_path": Rejected("checkpoints are written to a file system"),
    "s3_chunk_size": Inert(WHOLE, "only read with s3_path, which is refused"),
    "eval_ckpt": Inert(TEXT, "only the TokenFormer release's eval.py reads it", warn=True),
    "adlr_autoresume": Inert(
        BOOL, "NeoX resumes through a library of NVIDIA's clusters; auto_resume: true does it here", warn=True
    ),
    "adlr_autoresume_interval": Inert(WHOLE, "only read with adlr_autoresume"),
}

MONITOR_KEYS: dict[str, Entry] = {
    "log_interval": MapsTo("monitor.log_interval"),
    "log_batch_hashes": MapsTo("monitor.log_batch_hashes", difference="not a NeoX key"),
    "log_dir": MapsTo("monitor.log_dir", difference="the folder of metrics.jsonl; NeoX copies its output there"),
    "tensorboard_dir": MapsTo("monitor.tensorboard_dir"),
    "use_wandb": MapsTo("monitor.wandb.enabled"),
    "wandb_project": MapsTo("monitor.wandb.project"),
    "wandb_group": MapsTo("monitor.wandb.group", difference="taken as it is; NeoX appends a random suffix"),
    "wandb_team": MapsTo("monitor.wandb.team"),
    "wandb_host": MapsTo("monitor.wandb.host", difference="NeoX's default is https://api.wandb.ai"),
    "wandb_run_name": MapsTo("monitor.wandb.run_name"),
    "wandb_init_all_ranks": absent_flag("one rank records the run"),
    "use_comet": absent_flag("Comet is not supported", "use tensorboard_dir or use_wandb"),
    "comet_experiment": Inert(ANYTHING, _COMET),
    "comet_experiment_name": Inert(TEXT, _COMET),
    "comet_others": Inert(DICTIONARY, _COMET),
    "comet_project": Inert(TEXT, _COMET),
    "comet_tags": Inert(LIST, _COMET),
    "comet_workspace": Inert(TEXT, _COMET),
    "tensorboard": Rejected(_DEEPSPEED_MONITOR, "use tensorboard_dir", accepts=DICTIONARY),
    "wandb": Rejected(_DEEPSPEED_MONITOR, "use use_wandb", accepts=DICTIONARY),
    "csv_monitor": Rejected(_DEEPSPEED_MONITOR, "read metrics.jsonl in log_dir", accepts=DICTIONARY),
    "steps_per_print": Inert(WHOLE, "DeepSpeed's own progress lines are off; log_interval decides"),
    "wall_clock_breakdown": Inert(BOOL, "only prints DeepSpeed's timers, and slows the run to do so"),
    "log_grad_norm": Inert(BOOL, "the gradient norm is always recorded"),
    "log_param_norm": absent_flag("parameter norms are not recorded"),
    "log_grad_pct_zeros": absent_flag("shares of zero gradients are not recorded"),
    "log_optimizer_states": absent_flag("optimizer states are not recorded"),
    "log_gradient_noise_scale": absent_flag("the gradient noise scale is not measured"),
    "gradient_noise_scale_n_batches": Inert(WHOLE, _NOISE_SCALE),
    "gradient_noise_scale_cpu_offload": Inert(BOOL, _NOISE_SCALE),
    "memory_profiling": absent_flag("no memory trace is written", "see peak memory in metrics.jsonl"),
    "memory_profiling_path": Inert(TEXT, "only read with memory_profiling: true, which is refused"),
    "profile": absent_flag("no profile is written"),
    "profile_step_start": Inert(WHOLE, _PROFILE),
    "profile_step_stop": Inert(WHOLE, _PROFILE),
    "peak_theoretical_tflops": Rejected("utilization is only reported for devices whose peak is known"),
    "git_hash": Inert(TEXT, "the commit is found out by the run itself"),
    "dump_state": absent_flag("DeepSpeed's state is not dumped", "use --print-effective-config"),
    "flops_profiler": Rejected("DeepSpeed's profiler is not used", accepts=DICTIONARY),
    "comms_logger": Rejected("DeepSpeed's communication logger is not used", accepts=DICTIONARY),
}

GENERATION_KEYS: dict[str, Entry] = {
    "text_gen_type": MapsTo("generation.text_gen_type"),
    "temperature": MapsTo("generation.temperature"),
    "top_k": MapsTo("generation.top_k"),
    "top_p": MapsTo("generation.top_p"),
    "maximum_tokens": MapsTo("generation.maximum_tokens"),
    "num_samples": MapsTo("generation.num_samples", difference="counts for prompts too, not only without"),
    "sample_input_file": MapsTo("generation.sample_input_file"),
    "sample_output_file": MapsTo(
        "generation.sample_output_file", difference="records are printed when unset; NeoX's default is samples.txt"
    ),
    "prompt_end": MapsTo("generation.prompt_end"),
    "recompute": MapsTo("generation.recompute"),
    "return_logits": MapsTo("generation.return_logits"),
    "precompute_model_name": Rejected("activations are not precomputed"),
    "serve_model_weights": absent_flag("weights are not served over the network"),
    "weight_server_port": Inert(ANYTHING, "only read with serve_model_weights: true, which is refused"),
}

EVALUATION_KEYS: dict[str, Entry] = {
    "eval_tasks": MapsTo("evaluation.tasks"),
    "eval_results_prefix": MapsTo("evaluation.results_prefix"),
    "eval_num_fewshot": MapsTo("evaluation.num_fewshot", difference="a NeoX flag, not a key"),
    "eval_task_limit": MapsTo("evaluation.task_limit", difference="a NeoX flag, not a key"),
    "eval_batch_size": MapsTo("evaluation.batch_size", difference="not a NeoX key; there, the micro batch"),
    "eval_include_path": MapsTo("evaluation.include_path", difference="not a NeoX key"),
    "eval_iterations": MapsTo("evaluation.iterations", difference="not a NeoX key"),
    "eval_output": MapsTo("evaluation.output", difference="not a NeoX key; there, the current folder"),
    "eval_cache": MapsTo("evaluation.cache", difference="not a NeoX key"),
    "eval_hf_model": MapsTo("evaluation.hf_model", difference="not a NeoX key"),
    "eval_trust_remote_code": MapsTo("evaluation.trust_remote_code", difference="not a NeoX key"),
}

OUTPUT_KEYS: dict[str, Entry] = CHECKPOINT_KEYS | MONITOR_KEYS | GENERATION_KEYS | EVALUATION_KEYS
