"""Draws loss and tasks of a checkpoint over its sizes: `python deepy.py token_curve.py runs/elastic eval_output=curve`.

It measures the shares that the run was trained for (`elastic.shares`), or those of `param_token_shares`, on the first
eval_iters batches of the validation data, and with `--eval_tasks` on tasks of lm-eval; nothing is extracted. With
`param_token_top_ks` it measures instead the loss when each position reads its strongest tokens alone, and counts the
FLOPs: with those values alone, and by a kernel that reads blocks of 32. token_curve.csv and token_curve.png go to the
folder `eval_output`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from megatron_tokenformer import run_tool

from megatron.errors import ConfigError
from tools.validation_command import load_validation


def main(argv: Sequence[str]) -> int:
    """Loads the configuration and the checkpoint that it names, measures its parts, and writes what was found."""
    asked = load_validation(argv, "token_curve.py")
    if asked is None:
        return 0
    run, samples = asked
    if run.evaluation.output.endswith(".json"):
        raise ConfigError(f"eval_output: {run.evaluation.output}: a table and a figure are written. Name a folder.")
    from megatron.inference.evaluation.token_curve import measure_parts, write_points
    from megatron.mpu.process_group import inference_context, local_device

    with inference_context(run.parallel.model_parallel_size) as context:
        points = measure_parts(run, samples, context, local_device())
    if int(os.environ["RANK"]) == 0:
        for point in points:
            (loss, _), *_ = point.metrics.values()
            print(
                f"{point.reading.title or 'everything':<32} {point.parameters:>15,} parameters  "
                f"{point.flops_per_token:>15,.0f} FLOP/token ({point.block_sparse_flops_per_token:,.0f} by blocks)  "
                f"validation loss {loss:.4f}"
            )
        for file in write_points(points, Path(run.evaluation.output)):
            print(f"written: {file}")
    return 0


if __name__ == "__main__":
    run_tool(main)
