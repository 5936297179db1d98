"""Our checkpoint to a Hugging Face folder that transformers loads, and that has proved to compute the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig

from megatron.checkpointing.convert.imported_weights import VOCABULARY
from megatron.checkpointing.states.fold_ramp import fold_ramp
from megatron.checkpointing.states.layer_state import LayerState
from megatron.checkpointing.states.read_states import read_states
from megatron.checkpointing.states.same_model import described_model, model_differences
from megatron.checkpointing.states.tensor_folder import write_shards
from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.config.sections.run_config import RunConfig
from megatron.data.prompt_tokenizer import PromptTokenizer
from megatron.data.tokenizer import build_tokenizer
from megatron.errors import CheckpointError, ConfigError
from megatron.hf.hf_architecture import HF_ARCHITECTURES, HFArchitecture
from megatron.hf.logit_check import fixed_tokens, logit_difference
from megatron.hf.model_card import Publication, model_card
from megatron.hf.tokenizer_files import write_tokenizer
from megatron.io.durable import new_folder
from megatron.model.causal_lm import VocabSize, build_local
from megatron.mpu.parameters import DTYPES

Precision = Literal["auto", "fp32", "bf16", "fp16"]
DEFAULT_SHARD_BYTES = 1_000_000_000


@dataclass(frozen=True)
class ExportOptions:
    """Choices of an export."""

    precision: Precision = "auto"
    """Format of the weights; auto keeps that of the checkpoint."""
    trim_vocab: bool = False
    """Leave the padding rows of the vocabulary out."""
    tokenizer: bool = True
    """Write the tokenizer's files."""
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    """Largest weights file [bytes]; also what is in memory at a time, but never less than one layer."""
    published_as: Publication | None = None
    """Where the folder is to be found, for its card; None names the folder itself."""


def export_checkpoint(checkpoint: Checkpoint, run: RunConfig, output: Path, options: ExportOptions) -> float:
    """Writes `output` from a checkpoint and the configuration that describes it; returns the largest logit difference.

    Each weight appears under exactly one name of the other side, or it is an error. At the end transformers loads the
    folder, and its logits are compared with ours. Where anything fails, no folder is left. Raises ConfigError when the
    configuration describes another model or one that transformers cannot express, CheckpointError for damaged weights,
    DataError for a tokenizer that is missing or encodes otherwise.
    """
    model = checkpoint.config.model
    differences = model_differences(model, described_model(run, checkpoint))
    if differences:
        raise ConfigError(
            f"{checkpoint.path} holds another model than the configuration describes: {'; '.join(differences)}. Give "
            "the configuration that it was trained with."
        )
    architecture = HF_ARCHITECTURES[model.architecture]
    rows = checkpoint.state.vocab_size if options.trim_vocab else checkpoint.state.padded_vocab_size
    config = architecture.to_config(model, rows)
    weights = ExportedWeights(checkpoint, architecture, options, rows)
    config.dtype = weights.dtype
    config.architectures = [architecture.model_class.__name__]
    with new_folder(output) as folder:
        write_shards(folder, weights.under_their_names(), options.max_shard_bytes)
        if options.tokenizer:
            write_tokenizer(folder, run.data.tokenizer, model)
            _set_token_ids(config, PromptTokenizer(build_tokenizer(run.data.tokenizer), model))
        _write_config(folder, config, architecture)
        _generation_config(config, range(checkpoint.state.vocab_size, rows)).save_pretrained(folder)
        publication = options.published_as or Publication(output.name)
        dtype = str(weights.dtype).removeprefix("torch.")
        card = model_card(
            checkpoint,
            publication,
            dtype,
            rows,
            title=architecture.title,
            remote_code=config.is_remote_code(),
            has_tokenizer=options.tokenizer,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        tokens = fixed_tokens(checkpoint.state.vocab_size, model.seq_length)
        return logit_difference(folder, tokens, weights.logits(tokens), rows)


class ExportedWeights:
    """A checkpoint's weights as they are exported: rounded, without what is trimmed; a layer in memory at a time."""

    def __init__(self, checkpoint: Checkpoint, architecture: HFArchitecture, options: ExportOptions, rows: int) -> None:
        self.checkpoint = checkpoint
        self.architecture = architecture
        self.rows = rows
        first = next(read_states(checkpoint, optimizer=False))
        stored = next(iter(first.parameters.values())).weight.dtype
        self.dtype: torch.dtype = DTYPES.get(options.precision, stored)

    def layers(self) -> Iterator[LayerState]:
        """Yields each layer under our names. Raises CheckpointError for NaN, infinity or overflow."""
        for layer in read_states(self.checkpoint, optimizer=False):
            yield fold_ramp(layer, self.checkpoint.state).map(self._exported)

    def under_their_names(self) -> Iterator[dict[str, Tensor]]:
        """Yields the weights of `layers` under the names of transformers."""
        model, names = self.checkpoint.config.model, self.architecture.names
        for layer in self.layers():
            theirs = self.architecture.to_their_tensors(model, layer.weights())
            yield {names.to_theirs(name): weight.contiguous() for name, weight in theirs.items()}

    def logits(self, tokens: Tensor) -> Tensor:
        """Computes our float32 logits [B, S, rows] of the exported weights."""
        vocab = VocabSize(self.checkpoint.vocab.actual, padded=self.rows)
        with torch.device("meta"):
            model = build_local(self.checkpoint.config.model, vocab, seed=None)
        weights = {name: weight.float() for layer in self.layers() for name, weight in layer.weights().items()}
        model.load_state_dict(weights, strict=True, assign=True)
        with torch.no_grad():
            logits: Tensor = model.eval()(tokens)
        return logits

    def _exported(self, name: str, tensor: Tensor) -> Tensor:
        trimmed = tensor[: self.rows] if name in VOCABULARY else tensor
        rounded = trimmed.to(self.dtype)
        if not torch.isfinite(rounded).all():
            what = "NaN or infinity" if not torch.isfinite(tensor).all() else f"values too large for {self.dtype}"
            raise CheckpointError(f"{self.checkpoint.path}: {name} holds {what}. Export another checkpoint.")
        return rounded


def _set_token_ids(config: PretrainedConfig, tokenizer: PromptTokenizer) -> None:
    config.bos_token_id, config.eos_token_id = tokenizer.start, tokenizer.tokenizer.eod


def _write_config(folder: Path, config: PretrainedConfig, architecture: HFArchitecture) -> None:
    """Writes config.json; with it, for a model that transformers does not know by itself, the file that defines it."""
    if config.is_remote_code():
        module = architecture.model_class.__module__.rpartition(".")[2]
        name = architecture.model_class.__name__.removesuffix("ForCausalLM")
        config.auto_map = {
            "AutoModel": f"{module}.{name}Model",
            "AutoModelForCausalLM": f"{module}.{name}ForCausalLM",
            "AutoModelForSequenceClassification": f"{module}.{name}ForSequenceClassification",
        }
    config.save_pretrained(folder)


def _generation_config(config: PretrainedConfig, padding_rows: range) -> GenerationConfig:
    """Ends at the end of a document, and never chooses a padding row, as our own generation does not."""
    return GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.eos_token_id,
        suppress_tokens=list(padding_rows) or None,
    )
