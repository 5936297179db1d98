"""All that eval.py imports, for the process that runs are forked from when some of them evaluate."""

from __future__ import annotations

import importlib
import os

# Read once, at the first import: nobody asks the hub.
os.environ["HF_HUB_OFFLINE"] = "1"
for module in ("eval", "megatron.inference.evaluation.evaluate_models", "lm_eval.tasks", "lm_eval.evaluator"):
    importlib.import_module(module)
