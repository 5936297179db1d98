"""The viewer shows what the ranks of a training run read, step by step."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import yaml

from megatron.config.load_config import load_config
from megatron.config.sections.training import BatchConfig
from megatron.data.datasets import build_datasets, sample_counts
from megatron.data.formats.mmap import IndexedDatasetWriter
from megatron.data.micro_batch import micro_batches
from megatron.data.order import index_cache
from megatron.errors import CheckpointError, ConfigError, DataError
from tools.datasets import build_index
from tools.datasets.batch_viewer import main

SEQ_LENGTH = 8
CONFIG: dict[str, Any] = {
    "architecture": "gpt_neox",
    "num_layers": 1,
    "hidden_size": 8,
    "num_attention_heads": 1,
    "seq_length": SEQ_LENGTH,
    "max_position_embeddings": SEQ_LENGTH,
    "pos_emb": "rotary",
    "tokenizer_type": "CharLevelTokenizer",
    "optimizer": {"type": "Adam", "params": {"lr": 1e-3}},
    "train_iters": 30,
    "eval_iters": 0,
    "train_batch_size": 12,
    "train_micro_batch_size_per_gpu": 2,
    "split": "1",
    "num_workers": 0,
}


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., str]:
    """Write a dataset of texts and a configuration that reads it, with changes (None removes a key)."""
    rng = np.random.default_rng(1)
    with IndexedDatasetWriter(tmp_path / "corpus", np.uint16) as writer:
        for _ in range(60):
            writer.add_document([*rng.integers(97, 123, rng.integers(1, 90)), 0])

    def write(**changes: Any) -> str:
        values = CONFIG | {"data_path": str(tmp_path / "corpus"), "save": str(tmp_path / "run")} | changes
        path = tmp_path / "config.yml"
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
        return str(path)

    return write


def trained_on(config: str, world_size: int, num_steps: int) -> npt.NDArray[np.int64]:
    """What the loaders of all ranks give a run [steps, global batch, seq_length + 1], in the order of consumption."""
    loaded = load_config([Path(config)])
    batch: BatchConfig = loaded.batch(world_size)
    counts = sample_counts(loaded.run.training, batch.global_batch_size)
    datasets = build_datasets(loaded.run.data, counts, seq_length=SEQ_LENGTH, seed=1234, vocab_size=512)
    ranks = [
        micro_batches(
            datasets.train,
            consumed_samples=0,
            micro_batch_size=batch.micro_batch_size,
            data_rank=rank,
            data_size=batch.data_parallel_size,
            num_workers=0,
        )
        for rank in range(batch.data_parallel_size)
    ]
    accumulated = num_steps * batch.gradient_accumulation_steps
    rows = [next(rank).numpy() for _ in range(accumulated) for rank in ranks]
    return np.concatenate(rows).reshape(num_steps, batch.global_batch_size, SEQ_LENGTH + 1)


def view(*arguments: str, output: Path) -> npt.NDArray[np.int64]:
    assert main([*arguments, "--output", str(output)]) == 0
    array: npt.NDArray[np.int64] = np.load(output, allow_pickle=False)
    assert array.dtype == np.int64
    return array


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_steps_are_those_of_a_run_on_any_ranks(configure: Callable[..., str], tmp_path: Path, world_size: int) -> None:
    config = configure()
    want = trained_on(config, world_size, 30)
    output = tmp_path / "batches.npy"
    np.testing.assert_array_equal(view(config, "--start", "1", "--end", "30", output=output), want)
    np.testing.assert_array_equal(view(config, "--start", "7", "--end", "7", output=output), want[6:7])
    ranks = ["--world-size", str(world_size)]
    np.testing.assert_array_equal(view(config, "--start", "4", "--end", "5", *ranks, output=output), want[3:5])


def test_without_a_global_batch_the_ranks_decide(configure: Callable[..., str], tmp_path: Path) -> None:
    config = configure(train_batch_size=None, gradient_accumulation_steps=3)
    output = tmp_path / "batches.npy"
    steps = ["--start", "2", "--end", "3"]
    np.testing.assert_array_equal(view(config, *steps, output=output), trained_on(config, 1, 3)[1:])
    on_two = view(config, *steps, "--world-size", "2", output=output)
    np.testing.assert_array_equal(on_two, trained_on(config, 2, 3)[1:])
    assert on_two.shape == (2, 12, SEQ_LENGTH + 1)


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> dict[str, SimpleNamespace]:
    """Checkpoint states by folder; those that a test puts here are what the viewer finds."""
    states: dict[str, SimpleNamespace] = {}

    def find(folder: Path, *_: object) -> SimpleNamespace | None:
        return SimpleNamespace(state=states[str(folder)]) if str(folder) in states else None

    monkeypatch.setattr("megatron.checkpointing.store.find_checkpoint.find_checkpoint", find)
    return states


@pytest.mark.parametrize("key", ["save", "load"])
def test_order_of_a_resumed_run_is_the_one_it_began_with(
    configure: Callable[..., str], tmp_path: Path, saved: dict[str, SimpleNamespace], key: str
) -> None:
    """More steps would shuffle more epochs together, and the checkpoint keeps that from happening."""
    output, steps = tmp_path / "batches.npy", ["--start", "8", "--end", "13"]
    want = trained_on(configure(), 1, 13)[7:]
    assert not np.array_equal(view(configure(train_iters=3000), *steps, output=output), want)
    saved["resumed"] = SimpleNamespace(iteration=10, consumed_train_samples=120, train_index_samples=30 * 12)
    longer = configure(train_iters=3000, **{key: "resumed"})
    np.testing.assert_array_equal(view(longer, *steps, output=output), want)


def test_checkpoint_to_load_that_is_not_there(configure: Callable[..., str], saved: dict[str, SimpleNamespace]) -> None:
    assert not saved
    with pytest.raises(CheckpointError, match=r"load: nothing holds no checkpoint"):
        main([configure(load="nothing"), "--start", "1", "--end", "1", "--text"])


def test_another_batch_since_the_checkpoint(
    configure: Callable[..., str], tmp_path: Path, saved: dict[str, SimpleNamespace]
) -> None:
    """10 steps of 6 samples came before; from step 11 on, 12 a step."""
    config = configure(save="run")
    want = trained_on(config, 1, 30).reshape(-1, SEQ_LENGTH + 1)
    saved["run"] = SimpleNamespace(iteration=10, consumed_train_samples=60, train_index_samples=30 * 12)
    got = view(config, "--start", "11", "--end", "12", output=tmp_path / "batches.npy")
    np.testing.assert_array_equal(got.reshape(-1, SEQ_LENGTH + 1), want[60:84])
    with pytest.raises(ConfigError, match=r"has read 60 samples in 10 steps, not 12 a step\..* from 11 on"):
        main([config, "--start", "10", "--end", "11", "--text"])


def test_text(configure: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    config = configure()
    want = trained_on(config, 1, 2)[1]
    assert main([config, "--start", "2", "--end", "2", "--text"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[::2] == [f"--- step 2, sample {row}" for row in range(12)]
    assert lines[1::2] == [bytes(row.astype(np.uint8)).decode().replace("\0", "<|endoftext|>") for row in want]
    assert any("<|endoftext|>" in line for line in lines)


def test_steps_past_the_end_of_the_run(configure: Callable[..., str], tmp_path: Path) -> None:
    output = tmp_path / "batches.npy"
    with pytest.raises(ConfigError, match=r"--end 31: the run ends with step 30 \(`train_iters`\)"):
        main([configure(), "--start", "29", "--end", "31", "--output", str(output)])
    assert not output.exists()
    assert main([configure(), "train_iters=31", "--start", "31", "--end", "31", "--output", str(output)]) == 0


def test_nothing_is_written_when_the_data_is_damaged(configure: Callable[..., str], tmp_path: Path) -> None:
    config = configure()
    (tmp_path / "corpus.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"corpus\.bin"):
        main([config, "--start", "1", "--end", "1", "--output", str(tmp_path / "batches.npy")])
    assert not list(tmp_path.glob("batches.npy*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--start", "0", "--end", "2", "--text"], "--start counts from 1"),
        (["--start", "3", "--end", "2", "--text"], "--end is not before it"),
        (["--start", "1", "--end", "2"], "give --output, --text or both"),
    ],
)
def test_wrong_flags(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["config.yml", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_indices_are_built_ahead_of_a_run(
    configure: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure()
    assert build_index.main([config]) == 0
    monkeypatch.setattr(index_cache, "build_sample_index", None)
    assert main([config, "--start", "1", "--end", "30", "--output", str(tmp_path / "out.npy")]) == 0


def test_steps_of_preshuffled_rows_are_their_rows(configure: Callable[..., str], tmp_path: Path) -> None:
    """Step N of a batch B reads rows (N - 1) B to N B - 1, as Pythia's utils/batch_viewer.py shows them."""
    config = configure(preshuffled=True)
    rows = np.random.default_rng(3).integers(97, 123, (400, SEQ_LENGTH + 1))
    with IndexedDatasetWriter(tmp_path / "corpus", np.uint16) as writer:
        for row in rows:
            writer.add_document(row)
    assert main([config, "--start", "7", "--end", "9", "--output", str(tmp_path / "out.npy")]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), rows[72:108].reshape(3, 12, SEQ_LENGTH + 1))
    np.testing.assert_array_equal(trained_on(config, 2, 9)[6:], rows[72:108].reshape(3, 12, SEQ_LENGTH + 1))
