"""README.md of an exported folder: what the model is, how it was trained, how to load it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.config.model_size import count_parameters
from megatron.config.sections.run_config import RunConfig

USAGE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({where}{remote_code})
tokenizer = AutoTokenizer.from_pretrained({where}{remote_code})
inputs = tokenizer(["The parameter tokens"], return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=40)))
```"""

USAGE_WITHOUT_TOKENIZER = """The tokenizer is not part of this folder.

```python
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({where}{remote_code})
ids = torch.tensor([[0]])  # from the model's tokenizer
print(model.generate(ids, max_new_tokens=40))
```"""


@dataclass(frozen=True)
class Publication:
    """Name under which readers of the card load the model."""

    name: str
    """Folder or repository."""
    revision: str | None = None
    """Branch of the repository; None for its main one."""


def model_card(
    checkpoint: Checkpoint,
    publication: Publication,
    dtype: str,
    vocab_rows: int,
    *,
    title: str,
    remote_code: bool,
    has_tokenizer: bool,
) -> str:
    """Writes the card of an export, its weights in `dtype`, of a vocabulary of `vocab_rows` rows.

    `title` names the architecture; with `remote_code`, the folder holds the file that defines it. The card's snippet
    runs as it stands, where the name of the publication can be found.
    """
    run, state = checkpoint.config, checkpoint.state
    facts = _model_facts(run, vocab_rows, state.vocab_size) | _training_facts(run, state.consumed_train_samples)
    facts |= {"Checkpoint": f"step {state.iteration:,}", "Format of the weights": dtype}
    rows = "\n".join(f"| {what} | {value} |" for what, value in facts.items())
    where = json.dumps(publication.name, ensure_ascii=False)
    if publication.revision is not None:
        where += f", revision={json.dumps(publication.revision)}"
    usage = USAGE if has_tokenizer else USAGE_WITHOUT_TOKENIZER
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- {run.model.architecture}\n---\n\n"
        f"# {publication.name}\n\nA {title} language model.\n\n"
        f"{usage.format(where=where, remote_code=', trust_remote_code=True' if remote_code else '')}\n\n"
        f"| | |\n|---|---|\n{rows}\n"
    )


def _model_facts(run: RunConfig, vocab_rows: int, vocab_size: int) -> dict[str, str]:
    model, tokens = run.model, run.model.param_tokens
    facts = {
        "Parameters": f"{count_parameters(model, vocab_rows):,}",
        "Layers, hidden size, heads": f"{model.num_layers}, {model.hidden_size}, {model.num_attention_heads}",
    }
    if tokens is not None:
        facts["Parameter tokens"] = f"{tokens.qkv} in q, k and v each, {tokens.proj} in proj, {tokens.ffn} in the MLP"
        bases = f"{tokens.qkv_scale_base}, {tokens.proj_scale_base}, {tokens.ffn_scale_base}"
        facts["Normalization of scores"] = f"{tokens.theta}, scaled for {bases} tokens"
    unused = f", of which the last {vocab_rows - vocab_size:,} are padding" if vocab_rows > vocab_size else ""
    facts["Vocabulary"] = f"{vocab_rows:,} rows{unused}"
    if unused and model.mask_padded_vocab:
        facts["Vocabulary"] += " that training kept out of the softmax: leave their logits out"
    facts["Head"] = "tied to the embeddings" if model.tie_embeddings else "a matrix of its own"
    return facts


def _training_facts(run: RunConfig, consumed_samples: int) -> dict[str, str]:
    data, training = run.data, run.training
    paths = data.train_data_paths or ([data.data_path] if data.data_path else [])
    return {
        "Tokens seen": f"{consumed_samples * run.model.seq_length:,}",
        "Sequence length": f"{run.model.seq_length:,}",
        "Planned steps": f"{training.train_iters:,}",
        "Peak learning rate": f"{training.optimizer.lr:g}, {training.lr_schedule.style}",
        "Precision in training": training.precision.dtype,
        "Datasets": ", ".join(Path(path).name for path in paths) or "none named",
        "Seed": str(training.seed),
    }
