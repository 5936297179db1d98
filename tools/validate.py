"""Measures a checkpoint's loss on a fixed part of the validation data: `python deepy.py validate.py a.yml load=runs/a`.

It is the first eval_iters batches of the validation data, the same for every checkpoint and layout. The model is the
checkpoint's own; the configuration says data, sequence length, precision and layout. `eval_output=FILE.json` keeps the
result.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_tokenformer import run_tool

from tools.validation_command import load_validation


def main(argv: Sequence[str]) -> int:
    """Loads the configuration and the checkpoint that it names, measures it, and says what was found."""
    asked = load_validation(argv, "validate.py")
    if asked is None:
        return 0
    run, samples = asked
    from megatron.checkpointing.store.fetch import configured_checkpoint
    from megatron.io.durable import replace_durably
    from megatron.loaded_model.validation_loss import validation_loss
    from megatron.mpu.process_group import inference_context, local_device

    with inference_context(run.parallel.model_parallel_size) as context:
        checkpoint = configured_checkpoint(run.checkpoint)
        found = validation_loss(run, checkpoint, samples, context, local_device())
    if int(os.environ["RANK"]) == 0:
        title = "" if run.reading is None else run.reading.title
        part = f" ({title})" if title else ""
        print(
            f"{checkpoint.path}{part}: validation loss {found.loss:.4f}, perplexity {found.perplexity:.2f}, over "
            f"{samples:,} samples of {run.model.seq_length:,} tokens"
        )
        if run.evaluation.output.endswith(".json"):
            run_id = checkpoint.manifest.run_id
            record = {"checkpoint": str(checkpoint.path), "run_id": run_id, "iteration": checkpoint.state.iteration}
            record |= {"reading": title} if title else {}
            facts = {name: value for name, value in asdict(found).items() if value is not None}
            output = Path(run.evaluation.output)
            output.parent.mkdir(parents=True, exist_ok=True)
            replace_durably(output, json.dumps(record | facts, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_tool(main)
