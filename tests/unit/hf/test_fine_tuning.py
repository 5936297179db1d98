"""Training goes on from either side: the Trainer and peft from an exported folder, `finetune` from an imported one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainingArguments

from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.errors import CheckpointError
from megatron.hf.import_folder import import_folder
from megatron.training.run_start import find_start
from tests.helpers.tiny_checkpoints import MODELS, read_run, tokens, write_yaml


class Sequences(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Eight sequences that are their own labels."""

    def __init__(self) -> None:
        self.rows = torch.randint(512, (8, 16), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def test_trainer_fine_tunes_the_exported_folder(exported: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported)
    with torch.no_grad():
        rows = Sequences().rows
        before = float(model(rows, labels=rows).loss)
    arguments = TrainingArguments(
        tmp_path / "trainer",
        max_steps=6,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        activation_checkpointing=True,
        learning_rate=3e-3,
        warmup_steps=0,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=Sequences())
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    # The whole data set is one step, so the Trainer's first loss is ours before any step.
    assert abs(losses[0] - before) < 1e-3
    assert losses[-1] < losses[0] - 0.5
    trainer.save_model(tmp_path / "tuned")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    with torch.no_grad():
        torch.testing.assert_close(again(tokens()).logits, model.eval()(tokens()).logits, rtol=0, atol=1e-6)


def test_a_classifier_is_fine_tuned_from_the_exported_folder(exported: Path) -> None:
    """Sequences of two kinds of tokens are told apart, also those that it was not trained on, padded on the left."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(exported, num_labels=2)
    model.config.pad_token_id = 1
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(2, (64,), generator=generator)
    rows = torch.randint(2, 40, (64, 12), generator=generator) + 40 * labels[:, None]
    lengths = torch.randint(4, 13, (64,), generator=generator)
    mask = (torch.arange(12) >= 12 - lengths[:, None]).long()
    rows = rows.masked_fill(mask == 0, 1)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(20):
        loss = model.train()(rows[:48], attention_mask=mask[:48], labels=labels[:48]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        found = model.eval()(rows[48:], attention_mask=mask[48:]).logits.argmax(-1)
    assert found.tolist() == labels[48:].tolist()


def test_peft_lora_trains_parameter_tokens(exported: Path, tmp_path: Path) -> None:
    """Parameter tokens are parameters of no linear layer: peft names them by `target_parameters`."""
    model = AutoModelForCausalLM.from_pretrained(exported)
    with torch.no_grad():
        base = model(tokens()).logits
    names = ["key_tokens", "value_tokens"]
    lora = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=[], target_parameters=names))
    with torch.no_grad():
        torch.testing.assert_close(lora(tokens()).logits, base, rtol=0, atol=0)
    trainable = [parameter for parameter in lora.parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * 5 * 2 * 2  # layers, Pattentions, keys and values, A and B
    optimizer = torch.optim.AdamW(trainable, 1e-2)
    rows = Sequences().rows
    losses = []
    for _ in range(5):
        loss = lora.train()(rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3
    with torch.no_grad():
        tuned = lora.eval()(tokens()).logits
    lora.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(exported), tmp_path)
    merged = loaded.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(tokens()).logits, tuned, rtol=0, atol=1e-5)


def test_a_run_cannot_continue_from_imported_weights(exported: Path, tokenformer: Checkpoint, tmp_path: Path) -> None:
    import_folder(exported, tokenformer.config, tmp_path / "imported")
    config = write_yaml(tmp_path, MODELS["l2_norm_gelu"] | {"load": str(tmp_path / "imported")})
    with pytest.raises(CheckpointError, match="finetune: true"):
        find_start(read_run(config))
