"""Assembles a training run, from configuration to the last checkpoint, in the order in which things depend on another."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import subprocess
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron.checkpointing.folder import LATEST, Checkpoint, RunState, find_checkpoint, require_writable
from megatron.checkpointing.save_load import load_checkpoint, require_same_layout
from megatron.checkpointing.schedule import save_iterations
from megatron.config.data import DataConfig
from megatron.config.deepspeed import deepspeed_config
from megatron.config.output import CheckpointConfig
from megatron.config.run import RunConfig
from megatron.config.training import BatchConfig, PrecisionConfig
from megatron.data.batch import to_inputs_and_labels
from megatron.data.datasets import Datasets, SampleCounts, build_datasets, sample_counts
from megatron.data.loader import micro_batches
from megatron.data.tokenizer import Tokenizer, build_tokenizer, padded_vocab_size
from megatron.errors import CheckpointError, EnvironmentSetupError
from megatron.model.causal_lm import VocabSize
from megatron.model.flops import flops_per_token
from megatron.model.pipeline import build_pipeline
from megatron.monitor.throughput import Throughput, TimedIterator
from megatron.monitor.writers import Monitor, build_monitor
from megatron.mpu.context import ParallelContext
from megatron.training.callbacks import LogMetrics, SaveCheckpoints, Validate
from megatron.training.distributed import process_group
from megatron.training.evaluate import evaluate, loss_metrics
from megatron.training.loop import train
from megatron.training.lr_schedules import LRScheduler
from megatron.training.optimizer import build_optimizer
from megatron.training.progress import Callback, Progress

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine
    from torch.utils.data import Dataset

logger = logging.getLogger(__name__)
