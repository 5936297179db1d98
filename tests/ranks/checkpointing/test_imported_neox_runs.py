"""NeoX's checkpoints, imported, are trained, sampled from, evaluated and exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers import plain_torch
from tests.helpers.configs import write_dataset
from tests.helpers.eval_tasks import write_tasks
from tests.helpers.neox_writer import (
    MODELS,
    ROWS,
    imported,
    independent_logits,
    neox_weights,
    our_llama,
    our_weights,
    tokens,
    write_config,
    write_neox,
)
from tests.helpers.records import records
from tests.helpers.runs import run_ranks, train
from tools.ckpts import convert_neox_to_hf


@pytest.mark.parametrize("name", ["tokenformer", "pythia", pytest.param("llama", marks=pytest.mark.full)])
def test_training_generation_evaluation_and_export_accept_it(name: str, tmp_path: Path) -> None:
    settings = MODELS[name]
    weights = neox_weights(settings, ROWS)
    source = write_neox(tmp_path / "neox", weights, settings, "layers", tensor=2)
    dataset = write_dataset(tmp_path / "text_document")
    config = write_config(tmp_path, settings, data_path=str(dataset), index_cache_dir=str(tmp_path / "index"))
    imported(source, config, tmp_path / "out")

    train(config, f"load={tmp_path / 'out'}", "finetune=true", "train_iters=3", "model_parallel_size=2", ranks=2)
    named = our_llama(weights, settings) if name == "llama" else our_weights(weights, 2)
    ours = {parameter: tensor.double() for parameter, tensor in named.items()}
    expected = [loss for loss, _ in plain_torch.PlainRun(settings, 8, 3).follow(ours, dataset)]
    assert list(records(tmp_path / "run", "train/lm_loss").values()) == pytest.approx(expected, abs=1e-5, rel=0)

    texts = tmp_path / "texts.jsonl"
    asked = [f"load={tmp_path / 'out'}", "temperature=0.0", "maximum_tokens=5", f"sample_output_file={texts}"]
    finished = run_ranks(config, *asked, "text_gen_type=unconditional", "num_samples=1", script="generate")
    assert finished.code == 0, finished.output
    assert "text" in json.loads(texts.read_text())

    scores = tmp_path / "scores.json"
    tasks = write_tasks(tmp_path / "tasks")
    asked = ["--include_path", str(tasks), "--eval_tasks", "docs_text", "--output", str(scores)]
    finished = run_ranks(config, f"load={tmp_path / 'out'}", *asked, script="eval")
    assert finished.code == 0, finished.output
    assert scores.is_file()

    folder = tmp_path / "hf"
    arguments = ["--input_dir", tmp_path / "out", "--config_file", config, "--output_dir", folder]
    arguments += ["--precision", "auto", "--architecture", "llama" if name == "llama" else "neox"]
    assert convert_neox_to_hf.main(list(map(str, arguments))) == 0
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(tokens()).logits
    torch.testing.assert_close(logits.double(), independent_logits(weights, settings), rtol=0, atol=1e-5)
