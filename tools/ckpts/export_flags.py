"""Flags of the tools that export checkpoints to Hugging Face."""

from __future__ import annotations

import argparse

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
"""Those of megatron/hf/export_checkpoint.py, which takes seconds to import."""


def add_export_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --precision and --trim-vocab."""
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="auto keeps the checkpoint's")
    parser.add_argument("--trim-vocab", action="store_true", help="leave the padding rows of the vocabulary out")
