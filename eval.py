"""Scores checkpoints on tasks of lm-eval: `python deepy.py eval.py config.yml --eval_tasks lambada_openai piqa`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from megatron.errors import ConfigError, exit_on_user_error
from megatron.registry import install_extra, require


def main(argv: Sequence[str]) -> int:
    """Loads the configuration, scores the models that it names, and writes a results file for each."""
    from megatron.config.command_line import load_command_line
    from megatron.config.load_config import print_warnings

    command, loaded = load_command_line(argv, "eval.py")
    if command.answered:
        return 0
    run = loaded.run
    if not run.evaluation.tasks:
        raise ConfigError("eval_tasks: no task is named. Name some, as in `--eval_tasks lambada_openai hellaswag`.")
    from megatron.launch.environment import prepare_environment
    from megatron.mpu.process_group import inference_context, local_device

    prepare_environment()
    print_warnings(loaded)
    require("lm_eval", "eval.py", install_extra("eval"))
    from megatron.inference.evaluation.harness.harness_tasks import stay_offline_without_network

    stay_offline_without_network()
    from megatron.inference.evaluation.evaluate_models import evaluate_checkpoints, evaluate_hf_model

    if run.evaluation.hf_model is not None:
        if int(os.environ["WORLD_SIZE"]) > 1:
            raise ConfigError("eval_hf_model: one rank scores a Hugging Face model. Add `num_gpus=1`.")
        evaluate_hf_model(run)
        return 0
    with inference_context(run.parallel.model_parallel_size) as context:
        evaluate_checkpoints(run, context, local_device())
    return 0


if __name__ == "__main__":
    exit_on_user_error(lambda: main(sys.argv[1:]))
