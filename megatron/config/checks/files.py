"""Checks of the names of files and folders, in every section."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter

from megatron.config.checks.finding import Check, Finding
from megatron.config.sections.run_config import RunConfig

_FILES = (
    *("data.data_path", "data.train_data_paths", "data.valid_data_paths", "data.test_data_paths"),
    *("data.train_label_data_paths", "data.valid_label_data_paths", "data.test_label_data_paths"),
    *("data.index_cache_dir", "data.tokenizer.vocab_file", "data.tokenizer.merge_file"),
    *("checkpoint.save", "checkpoint.load", "checkpoint.pretrain_partial_init", "checkpoint.remote_cache_dir"),
    *("monitor.log_dir", "monitor.tensorboard_dir", "generation.sample_input_file", "generation.sample_output_file"),
    *("evaluation.include_path", "evaluation.output", "evaluation.results_prefix", "evaluation.cache"),
    "evaluation.hf_model",
)
"""Values that name files and folders."""


_LONGEST_NAME = 200
"""Bytes of a file's name [bytes]; Linux has 255, and what is written adds endings."""


_LONGEST_PATH = 3500
"""Bytes of a path [bytes]; Linux has 4095."""


def _file_names(run: RunConfig) -> Iterator[Finding]:
    for path in (*_FILES, *([] if run.distillation is None else ["distillation.teacher"])):
        value = attrgetter(path)(run)
        for name in value if isinstance(value, list) else [value]:
            if name == "" and path != "evaluation.results_prefix":
                yield Finding(path, "names no file or folder; give null, or leave the key out")
            elif name is not None and len(name.encode()) > _LONGEST_PATH:
                yield Finding(path, f"is longer than {_LONGEST_PATH:,} bytes, which no path can be")
            elif name is not None and any(len(part.encode()) > _LONGEST_NAME for part in name.split("/")):
                yield Finding(
                    path, f"has a part of more than {_LONGEST_NAME} bytes; no file with an ending can have it"
                )


CHECKS: tuple[Check, ...] = (_file_names,)
