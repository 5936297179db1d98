"""Checks of what commands do besides training: profiles, evaluation and generation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron.config.checks.finding import Check, Finding
from megatron.config.sections.run_config import RunConfig


def _profiled_steps(run: RunConfig) -> Iterator[Finding]:
    profile, last = run.monitor.profile, run.training.train_iters
    if not profile.enabled:
        if profile.memory:
            yield Finding("monitor.profile.memory", "needs profile: true, whose steps it is for")
        return
    if profile.step_stop < profile.step_start:
        yield Finding(
            "monitor.profile.step_stop", f"is before profile_step_start {profile.step_start}; use that step or later"
        )
    if profile.step_start > last:
        yield Finding("monitor.profile.step_start", f"the run ends with step {last} (train_iters); use an earlier one")


def _evaluation_output(run: RunConfig) -> Iterator[Finding]:
    evaluation = run.evaluation
    if evaluation.iterations != "all" and len(evaluation.iterations) > 1 and evaluation.output.endswith(".json"):
        yield Finding("evaluation.output", "several checkpoints do not go into one .json file; name a folder")


def _prompts(run: RunConfig) -> Iterator[Finding]:
    if run.generation.text_gen_type == "input-file" and run.generation.sample_input_file is None:
        yield Finding("generation.text_gen_type", "needs sample_input_file")
    if (run.generation.text_gen_type == "prompt") != (run.generation.prompt is not None):
        yield Finding(
            "generation.prompt", "goes with `text_gen_type: prompt`, which it implies where the type is not given"
        )
    files = run.generation.sample_input_file, run.generation.sample_output_file
    if None not in files and len({str(Path(str(file)).resolve()) for file in files}) == 1:
        yield Finding("generation.sample_output_file", "would overwrite the prompts; name another file")
    if run.generation.text_gen_type == "interactive" and run.generation.return_logits:
        yield Finding("generation.return_logits", "a terminal has no room for logits; use text_gen_type: input-file")


CHECKS: tuple[Check, ...] = (
    _profiled_steps,
    _evaluation_output,
    _prompts,
)
