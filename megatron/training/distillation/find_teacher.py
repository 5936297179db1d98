"""Finds the teacher that a run is distilled from, and holds it to what the run needs of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from megatron.checkpointing.states.layer_state import LayerState
from megatron.checkpointing.store.checkpoint import Checkpoint, checkpoint_paths
from megatron.checkpointing.store.find_checkpoint import find_checkpoint
from megatron.checkpointing.store.manifest import MANIFEST_FILE
from megatron.config.build_config import require_consistent
from megatron.config.model_size import count_parameters, forward_flops
from megatron.config.sections.checkpoint import Verification
from megatron.config.sections.data import TokenizerConfig
from megatron.config.sections.distillation import DistillationConfig
from megatron.config.sections.model import ModelConfig
from megatron.config.sections.run_config import RunConfig
from megatron.data.data_fingerprint import tokenizer_fingerprint
from megatron.data.tokenizer import Tokenizer, build_tokenizer, padded_vocab_size
from megatron.errors import CheckpointError, ConfigError, os_errors_as
from megatron.io.hashing import file_sha256, folder_sha256
from megatron.model.causal_lm import VocabSize
from megatron.mpu.agreement import on_first_rank
from megatron.registry import install_extra, require

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
PROBE = "The quick brown fox jumps over 13 lazy dogs.\n\tdef f(x): return x**2  # naïve café, 東京\n"
"""Text that two tokenizers are compared by, beside the text of each id."""


@dataclass(frozen=True)
class Teacher:
    """A teacher on disk that fits the run."""

    path: Path
    model: ModelConfig
    """As the run computes with it: at the run's sequence length, with its own rows of the vocabulary."""
    vocab: VocabSize
    """The run's: padding takes no part in distillation, so the teacher's may differ."""
    checkpoint: Checkpoint | None
    """The checkpoint; None for a Hugging Face folder."""
    layers: Callable[[], Iterator[LayerState]] | None
    """Reads the layers of a Hugging Face folder; None for a checkpoint."""
    remark: str
    """What could not be compared, for the run's log; empty when all could."""

    @cached_property
    def sha256(self) -> str:
        """Returns its identity: of the checkpoint's manifest, or of a Hugging Face folder's files with their names.

        Collective where there are ranks.
        """
        with os_errors_as(CheckpointError, str(self.path)):
            if self.checkpoint is None:
                return on_first_rank(partial(folder_sha256, self.path))
            return on_first_rank(partial(file_sha256, self.checkpoint.path / MANIFEST_FILE))

    @property
    def flops_per_token(self) -> int:
        """Returns the operations of its forward pass [FLOP per token]."""
        return forward_flops(self.model, self.vocab.padded, self.model.seq_length).total

    def describe(self) -> dict[str, Any]:
        """Returns the entry of run.json."""
        return {
            "path": str(self.path.resolve()),
            "kind": "huggingface" if self.checkpoint is None else "checkpoint",
            "iteration": None if self.checkpoint is None else self.checkpoint.state.iteration,
            "sha256": self.sha256,
            "architecture": self.model.architecture,
            "num_layers": self.model.num_layers,
            "hidden_size": self.model.hidden_size,
            "parameters": count_parameters(self.model, self.vocab.padded),
            "flops_per_token": self.flops_per_token,
        }

    def summary(self, config: RunConfig) -> str:
        """Describes size and memory in a line for the user."""
        count = count_parameters(self.model, self.vocab.padded)
        ranks = config.parallel.model_parallel_size * config.parallel.pipe_parallel_size
        dtype = config.training.precision.dtype
        gib = count * BYTES[dtype] / ranks / 2**30
        return (
            f"distilled from {self.path}: {self.model.architecture}, {self.model.num_layers} layers of "
            f"{self.model.hidden_size}, {count:,} parameters; {gib:.3g} GiB in {dtype} on each rank, without optimizer "
            f"state{self.remark}"
        )


def find_teacher(config: RunConfig, verification: Verification) -> Teacher | None:
    """Finds the configured teacher; None for a run without one. Collective where there are ranks.

    `verification` says what is compared with a checkpoint's manifest. Raises CheckpointError for a teacher that is
    missing, not whole or unknown, ConfigError for one that does not fit the run: another tokenizer or vocabulary, a
    shorter context, sizes that do not split over the ranks; DataError without the run's tokenizer.
    """
    asked = config.distillation
    if asked is None:
        return None
    tokenizer = build_tokenizer(config.data.tokenizer)
    vocab = VocabSize(tokenizer.vocab_size, padded_vocab_size(config.model, tokenizer.vocab_size))
    path = Path(asked.teacher)
    try:
        with os_errors_as(CheckpointError, str(path)):
            if on_first_rank(partial(_is_huggingface, path)):
                teacher = _from_huggingface(path, asked, config, tokenizer, vocab)
            else:
                teacher = _from_checkpoint(path, asked, config, vocab, verification)
        _require_fit(teacher, config)
    except (ConfigError, CheckpointError) as error:
        raise type(error)(f"distillation.teacher: {error}") from error
    return teacher


def require_same_teacher(teacher: Teacher | None, start: Checkpoint, config: DistillationConfig | None) -> None:
    """Raises CheckpointError when a run that continues from `start` would go on with another teacher, or without."""
    before, now = start.state.teacher, None if teacher is None else teacher.sha256
    if before == now or (config is not None and config.allow_changed_teacher):
        return
    if teacher is None:
        raise CheckpointError(
            f"{start.path} was distilled from a teacher, and the configuration names none. Restore its section "
            "`distillation`, or set `finetune: true` to start a run without a teacher from its weights."
        )
    was = "trained without a teacher" if before is None else f"distilled from another one (SHA-256 {before[:12]})"
    raise CheckpointError(
        f"{start.path} was {was}, and `distillation.teacher` is {teacher.path} (SHA-256 {teacher.sha256[:12]}). "
        "Restore the teacher (`distillation.iteration` names the step of its checkpoint), or set "
        "`distillation.allow_changed_teacher: true` to go on with this one."
    )


def _is_huggingface(path: Path) -> bool:
    """Tells whether a folder is of Hugging Face. Raises CheckpointError when it is nothing that we know."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder. Correct the path.")
    if (
        (path / MANIFEST_FILE).exists()
        or path.name.startswith("global_step")
        or any(True for _ in checkpoint_paths(path))
    ):
        return False
    if (path / "config.json").is_file():
        return True
    raise CheckpointError(
        f"{path} holds neither a finished checkpoint (global_stepN) nor a Hugging Face model "
        "(config.json). Name a run's folder after its first save, one of its checkpoints, or an exported folder."
    )


def _from_checkpoint(
    path: Path, asked: DistillationConfig, config: RunConfig, vocab: VocabSize, verification: Verification
) -> Teacher:
    found = find_checkpoint(path, asked.iteration, verification)
    if found is None:
        raise CheckpointError(f"{path} holds no checkpoint. Correct the path.")
    _require_same_tokenizer(found, config.data.tokenizer, vocab)
    remark = "" if found.state.data_fingerprint else _NOT_COMPARED.format("it does not record its tokenizer")
    model = _at_length(found.config.model, config.model.seq_length, found.path)
    return Teacher(found.path, model, vocab, found, None, remark)


_NOT_COMPARED = "; {}, so that only the number of tokens could be compared"


def _require_same_tokenizer(found: Checkpoint, tokenizer: TokenizerConfig, vocab: VocabSize) -> None:
    if found.state.vocab_size != vocab.actual:
        raise ConfigError(
            f"{found.path} has a vocabulary of {found.state.vocab_size:,} tokens, and this run "
            f"one of {vocab.actual:,}. A teacher's distribution is over its own tokens: use the tokenizer that it was "
            "trained with, or another teacher."
        )
    theirs = found.state.data_fingerprint
    ours = on_first_rank(partial(tokenizer_fingerprint, tokenizer))
    keys = ("tokenizer_type", "vocab_file", "merge_file")
    differing = [key for key in keys if ours.get(key) != theirs.get(key)]
    if theirs and differing:
        raise ConfigError(
            f"{found.path} was trained with another tokenizer ({', '.join(differing)} differ), "
            "in which the same ids are other tokens. Use the tokenizer that it was trained with, or another teacher."
        )


def _from_huggingface(
    path: Path, asked: DistillationConfig, config: RunConfig, tokenizer: Tokenizer, vocab: VocabSize
) -> Teacher:
    if asked.iteration is not None:
        raise ConfigError(f"{path} is a Hugging Face folder, which has no steps: leave distillation.iteration out.")
    require("transformers", "distillation.teacher", install_extra("hf"))
    from megatron.hf.import_folder import folder_model, read_config, read_hf_states

    rows = read_config(path).vocab_size
    if rows < vocab.actual:
        raise ConfigError(
            f"{path} has a vocabulary of {rows:,} rows, and this run's tokenizer "
            f"{vocab.actual:,} ids. Use the tokenizer that it was trained with, or another teacher."
        )
    file = path / "tokenizer.json"
    if file.is_file():
        theirs = build_tokenizer(TokenizerConfig(type="HFTokenizer", vocab_file=str(file)))
        difference = next(_tokenizer_differences(tokenizer, theirs), None)
        if difference is not None:
            raise ConfigError(
                f"{file} is another tokenizer than this run's: {difference}. Use the tokenizer "
                "that the teacher was trained with, or another teacher."
            )
    # Padding takes no part in distillation, so that the teacher's may be cut off or added.
    own = folder_model(path, padded_vocab_size=vocab.padded, mask_padded_vocab=True)
    model = _at_length(own, config.model.seq_length, path)
    layers = partial(read_hf_states, path, config.model_copy(update={"model": model}))
    remark = "" if file.is_file() else _NOT_COMPARED.format("it has no tokenizer.json")
    return Teacher(path, model, vocab, None, layers, remark)


def _tokenizer_differences(ours: Tokenizer, theirs: Tokenizer) -> Iterator[str]:
    """Yields how two tokenizers differ: in the number of their ids, the text of an id, the ids of a text."""
    if ours.vocab_size != theirs.vocab_size:
        yield f"{theirs.vocab_size:,} ids, and this run's {ours.vocab_size:,}"
        return
    for number in range(ours.vocab_size):
        our_text, their_text = ours.detokenize([number]), theirs.detokenize([number])
        # Special and unused ids have no text, or one that is a placeholder.
        if our_text and their_text and our_text != their_text:
            yield f"id {number} is {their_text!r}, and this run's {our_text!r}"
    if ours.tokenize(PROBE) != theirs.tokenize(PROBE):
        yield "the same text is cut into other tokens"


def _at_length(model: ModelConfig, seq_length: int, path: Path) -> ModelConfig:
    """Returns the teacher's model at the run's sequence length. Raises ConfigError when it knows fewer positions."""
    if model.max_position_embeddings < seq_length:
        raise ConfigError(
            f"{path} knows {model.max_position_embeddings:,} positions "
            f"(max_position_embeddings), and this run has seq_length {seq_length:,}. Use shorter sequences, or another "
            "teacher."
        )
    return model.model_copy(update={"seq_length": seq_length})


def _require_fit(teacher: Teacher, config: RunConfig) -> None:
    """Holds the teacher to the checks of a configuration on the run's ranks, of which it has the layout."""
    rows = {"padded_vocab_size": teacher.vocab.padded, "make_vocab_size_divisible_by": 1}
    model = teacher.model.model_copy(update=rows)
    try:
        require_consistent(config.model_copy(update={"model": model}), config)
    except ConfigError as error:
        raise ConfigError(f"{teacher.path} does not fit this run's layout: {error}") from error
