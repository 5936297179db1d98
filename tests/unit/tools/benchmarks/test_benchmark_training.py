"""The benchmark compares like with like, and computes its figures rightly."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from megatron.config.command_line import parse_command_line
from megatron.config.load_config import load_config
from megatron.config.model_size import count_parameters
from megatron.errors import ConfigError
from megatron.model.causal_lm import VocabSize
from tests.helpers.configs import BENCHMARKED
from tools.benchmarks.benchmark_training import main, peers_table, summarize, summarize_peers, table
from tools.benchmarks.contenders import PlainTorch, PublishedOperations, PublishedRecomputing, Task, TransformersLoop
from tools.benchmarks.peers import AS_TRANSFORMER, PEERS, equal_transformer


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yml"
    path.write_text(yaml.safe_dump(BENCHMARKED))
    return path


def _plain_losses(config: Path, *overrides: str) -> list[float]:
    loaded = load_config([config], overrides)
    contender = PlainTorch(Task(loaded.run, loaded.batch(1), VocabSize(100, 112)))
    return [float(contender.step()) for _ in range(8)]


def test_recomputing_changes_nothing_in_the_plain_loop(config: Path) -> None:
    kept = _plain_losses(config)
    for layers in (1, 2):
        recomputed = _plain_losses(config, "checkpoint_activations=true", f"checkpoint_num_layers={layers}")
        assert recomputed == pytest.approx(kept, abs=1e-6)


def test_the_plain_loop_in_bf16_learns_as_in_fp32(config: Path) -> None:
    exact, rounded = _plain_losses(config), _plain_losses(config, "precision=bfloat16")
    assert rounded != exact
    assert rounded == pytest.approx(exact, abs=0.02)


def test_the_plain_loop_keeps_fp32_weights_beside_bf16_ones(config: Path) -> None:
    loaded = load_config([config], ["precision=bfloat16"])
    contender = PlainTorch(Task(loaded.run, loaded.batch(1), VocabSize(100, 112)))
    for _ in range(3):
        contender.step()
    for master, weight in contender.weight_pairs:
        assert (master.dtype, weight.dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(weight, master.bfloat16())
        assert not torch.equal(master, weight.float())  # updates too small for bf16 are not lost


def test_masked_padding_is_left_out_of_the_softmax(config: Path) -> None:
    loaded = load_config([config])
    task = Task(loaded.run, loaded.batch(1), VocabSize(100, 112))
    masked_model = loaded.run.model.model_copy(update={"mask_padded_vocab": True})
    masked = replace(task, config=loaded.run.model_copy(update={"model": masked_model}))
    assert float(PlainTorch(task).step() - PlainTorch(masked).step()) == pytest.approx(
        torch.tensor(112 / 100).log().item(), abs=0.01
    )


@pytest.mark.parametrize("published", [PublishedOperations, PublishedRecomputing])
def test_the_published_operations_compute_the_same_model(config: Path, published: type[PlainTorch]) -> None:
    loaded = load_config([config])
    contender = published(Task(loaded.run, loaded.batch(1), VocabSize(100, 112)))
    losses = [float(contender.step()) for _ in range(8)]
    assert losses == pytest.approx(_plain_losses(config), abs=1e-6)


def test_the_transformer_has_as_many_parameters(config: Path) -> None:
    """The TokenFormer has 3 layers of 2 D 256, a Transformer's has 12 D^2; transformers' model takes the same steps."""
    command = parse_command_line([str(config), "ffn_slot_num=128"])
    loaded = equal_transformer(command, 100)
    model = loaded.run.model
    assert (model.architecture, model.hidden_size, model.num_layers) == ("gpt_neox", 32, 4)
    ours = load_config(command.files, command.overrides).run.model
    assert count_parameters(model, 112) == pytest.approx(count_parameters(ours, 112), rel=0.05)
    task = Task(loaded.run, loaded.batch(1), VocabSize(100, 112))
    theirs, plain = TransformersLoop(task), PlainTorch(task)
    for _ in range(4):
        assert float(theirs.step()) == pytest.approx(float(plain.step()), abs=1e-5)


def test_peers_are_those_of_a_tokenformer(config: Path) -> None:
    with pytest.raises(ConfigError, match="architecture gpt_neox: --peers times a TokenFormer"):
        main([str(config), *AS_TRANSFORMER, "--peers", "--vocab-size", "100"])


def test_figures_of_peers() -> None:
    one = {"micro_batch_size": 2, "gradient_accumulation_steps": 1, "seq_length": 64, "peak_flops": 1e6}
    one |= {"config": ["a.yml"], "dtype": "bf16", "device": "cpu", "cpu_threads": 1, "torch": "2.13.0"}
    descriptions = {
        name: one | {"parameters": 1000, "flops_per_token": 100.0 + place} for place, name in enumerate(PEERS)
    }
    blocks = {
        name: [
            {"seconds": seconds * (1 + place), "processor_seconds": seconds * (1 + place / 2), "losses": [float(place)]}
            for seconds in (9.0, 1.0, 2.0, 4.0)
        ]
        for place, name in enumerate(PEERS)
    }
    report = summarize_peers(descriptions, blocks, dict.fromkeys(PEERS, 1.5), steps=2)
    last = report["results"][PEERS[-1]]
    assert last["engine_is_faster"] == pytest.approx(5.0) and last["first_loss"] == 4.0
    assert last["tokens_per_second"] == pytest.approx(128 / 5.0)
    assert last["mfu"] == pytest.approx(128 / 5.0 * 104.0 / 1e6)
    row = peers_table(report).splitlines()[-3].split()
    assert row[:2] == ["Transformer,", "transformers"]
    assert row[3:] == ["25.6", "5000.0", "0.3%", "1.50", "5.000", "(5.000", "to", "5.000),", "3.000"]


def test_figures() -> None:
    description = {
        "config": ["a.yml"],
        "parameters": 1_500_000,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "seq_length": 128,
        "dtype": "bf16",
        "device": "NVIDIA A100-SXM4-80GB",
        "cpu_threads": 1,
        "torch": "2.13.0",
        "flops_per_token": 1e9,
        "peak_flops": 312e12,
    }
    # The untimed first block is slow, and the machine gets slower with every round.
    blocks = {
        "engine": [{"seconds": s, "processor_seconds": 0.8, "losses": [3.0, 2.5]} for s in (50.0, 1.0, 2.0, 4.0)],
        "plain torch": [{"seconds": s, "processor_seconds": s, "losses": [3.0, 2.25]} for s in (9.0, 0.9, 1.9, 4.0)],
    }
    report = summarize(description, blocks, {"engine": 2.0, "plain torch": 1.5}, steps=2)
    assert report["results"]["engine"] == {
        "steps_per_second": 1.0,
        "tokens_per_second": 1024.0,
        "step_seconds": [0.5, 1.0, 2.0],
        "processor_seconds": [0.4, 0.4, 0.4],
        "peak_memory_gib": 2.0,
        "mfu": pytest.approx(1024.0 * 1e9 / 312e12),
    }
    assert report["ratios"] == pytest.approx([0.9, 0.95, 1.0])
    assert report["ratio"] == pytest.approx(0.95)
    assert report["processor_ratio"] == pytest.approx(1.9 / 0.8)
    assert report["largest_loss_difference"] == 0.25
    assert "in processor time: 2.375" in table(report | {"device": "cpu"})
    text = table(report)
    assert "a.yml: 1.5M parameters, bf16, NVIDIA A100-SXM4-80GB, torch 2.13.0" in text
    assert "steps/s: 0.950 (rounds: 0.900 to 1.000)" in text
    engine = next(line for line in text.splitlines() if line.startswith("engine  ")).split()
    assert engine == ["engine", "1.000", "1.02k", "1000.0", "500.0", "2000.0", "0.3%", "2.00", "GiB"]


def test_a_configuration_for_several_ranks_is_refused(config: Path) -> None:
    with pytest.raises(ConfigError, match="model_parallel_size=1 pipe_parallel_size=1"):
        main([str(config), "pipe_parallel_size=2", "--vocab-size", "100"])
