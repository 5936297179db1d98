"""Elastic runs by the user's command: what each step reads, in every layout, resumed, against float64."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml

from megatron.checkpointing.states.read_states import read_states, read_weights
from megatron.checkpointing.store.checkpoint import read_checkpoint
from megatron.config.load_config import load_config
from megatron.config.model_size import training_flops
from megatron.config.token_share import model_of_share
from tests.helpers.configs import TOKENFORMER, layout_keys
from tests.helpers.plain_torch import PlainRun, Weights, sample_order, tokenformer
from tests.helpers.records import records
from tests.helpers.runs import run_ranks, train
from tests.helpers.tensor_files import assert_same_checkpoint
from tools.ckpts import extract

STEPS = 6
BASE: dict[str, Any] = TOKENFORMER | {
    "qkv_slot_num": 32,
    "proj_slot_num": 32,
    "param_token_groups": 4,
    "train_iters": STEPS,
    "eval_interval": 3,
}
SHARES = [0.5, 0.25, 1]
"""In no order."""
TOLERANCE = 1e-5
"""Of losses and norms between layouts (tests/helpers/layout_runs.py)."""
MODES: dict[str, dict[str, Any]] = {
    "sampled": {"shares": SHARES},
    "alternate": {"shares": SHARES, "full_model": "alternate", "sample": "sublayer"},
    "always": {"shares": SHARES, "full_model": "always", "distillation_weight": 0.4, "temperature": 2.0},
}


PLAIN: dict[str, Any] = layout_keys(batch=8) | {"extra_save_iters": [0], "elastic": MODES["sampled"]}
"""Of the run that is compared with plain torch, in one micro batch a step."""


class Runs:
    """Runs of one dataset, by name."""

    def __init__(self, folder: Path, dataset: Path) -> None:
        self.folder = folder
        self.data = {"data_path": str(dataset), "index_cache_dir": str(folder / "index")}

    def config(self, name: str, **keys: Any) -> Path:
        path = self.folder / f"{name}.yml"
        path.write_text(yaml.safe_dump(BASE | self.data | {"save": str(self.folder / name)} | keys))
        return path

    def train(self, name: str, ranks: int = 1, **keys: Any) -> Path:
        """A run that must succeed; returns its folder. A second one of the same name is the first."""
        if not (self.folder / name / "latest").exists():
            train(self.config(name, **keys), ranks=ranks)
        return self.folder / name


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Runs:
    return Runs(tmp_path_factory.mktemp("elastic"), dataset)


def shares_of_steps(run: Path) -> dict[int, float]:
    """The share that each step has recorded its loss under."""
    found = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for key in row:
            if key.startswith("train/lm_loss_share_"):
                found[row["iteration"]] = float(key.removeprefix("train/lm_loss_share_"))
    return found


def curves(run: Path) -> dict[str, dict[int, float]]:
    """All losses and norms that a run has recorded."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = sorted({key for row in rows for key in row if "loss" in key or key in ("train/grad_norm", "training_flops")})
    return {key: records(run, key) for key in keys}


def test_a_step_of_the_whole_model_is_an_ordinary_step(runs: Runs, tokenformer_run: Path) -> None:
    """Bitwise: losses, norms, weights and moments of a run whose only share is 1."""
    sizes = {key: TOKENFORMER[key] for key in ("qkv_slot_num", "proj_slot_num")}
    whole = runs.train("whole", elastic={"shares": [1]}, **sizes)
    for key in ("train/lm_loss", "train/grad_norm", "training_flops"):
        ordinary = records(tokenformer_run, key)
        assert records(whole, key) == {step: ordinary[step] for step in range(1, STEPS + 1)}, key
    assert_same_checkpoint(whole / f"global_step{STEPS}", tokenformer_run / f"global_step{STEPS}")


@pytest.mark.parametrize(
    ("mode", "ranks", "layout"),
    [
        ("always", 2, {"model_parallel_size": 2}),
        pytest.param("always", 2, {"pipe_parallel_size": 2, "checkpoint_activations": True}),
        pytest.param("sampled", 2, {"model_parallel_size": 2, "sequence_parallel": True}, marks=pytest.mark.full),
        pytest.param("alternate", 2, {"pipe_parallel_size": 2}, marks=pytest.mark.full),
        pytest.param("always", 2, {"train_micro_batch_size_per_gpu": 2}, marks=pytest.mark.full),
        pytest.param("sampled", 4, {"pipe_parallel_size": 2, "model_parallel_size": 2}, marks=pytest.mark.full),
        pytest.param("alternate", 4, {"model_parallel_size": 4}, marks=pytest.mark.full),
    ],
)
def test_every_layout_reads_the_same_shares(mode: str, ranks: int, layout: dict[str, Any], runs: Runs) -> None:
    """Losses of every step and share, the norm, and FLOPs; recomputed activations are those of their own pass."""
    alone = curves(runs.train(mode, elastic=MODES[mode]))
    name = "-".join([mode, *(f"{key}{value}" for key, value in layout.items())])
    split = curves(runs.train(name, ranks=ranks, elastic=MODES[mode], **layout))
    assert split.keys() == alone.keys() and "valid/lm_loss_share_0.25" in alone
    for key, values in alone.items():
        # A divergence of distributions that are nearly equal is a difference of float32 logarithms.
        rounding = 1e-6 if key == "train/distillation_loss" else 0.0
        assert split[key] == pytest.approx(values, rel=TOLERANCE, abs=rounding), key


def share_of_rows(weights: Weights, share: float, groups: int = 4) -> Weights:
    """The first part of each group of the rows of keys and values, written out."""
    taken = {}
    for name, weight in weights.items():
        if name.endswith("_tokens"):
            block = len(weight) // groups
            rows = [group * block + row for group in range(groups) for row in range(round(share * block))]
            taken[name] = weight[rows]
        else:
            taken[name] = weight
    return taken


SCALES = {"query": 32, "key": 32, "value": 32, "proj": 32, "mlp": 48}
"""Of the whole model, which every share keeps."""


class PlainElasticRun(PlainRun):
    """A run in float64 whose steps read the shares that they are given; others' rows have gradients of zero."""

    def follow_shares(self, weights: Weights, prefix: Path, shares: dict[int, float]) -> Iterator[tuple[float, float]]:
        samples = sample_order(prefix, self.settings, self.steps * self.batch)
        first = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        second = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        for step in range(self.steps):
            tokens = torch.stack([next(samples) for _ in range(self.batch)])
            leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
            read = share_of_rows(leaves, shares[step + 1])
            logits = tokenformer(read, tokens[:, :-1], self.settings | {"scales": SCALES})
            loss = F.cross_entropy(logits.flatten(0, -2), tokens[:, 1:].flatten())
            loss.backward()
            norm = math.sqrt(sum(float(leaf.grad.pow(2).sum()) for leaf in leaves.values() if leaf.grad is not None))
            clip, rate = min(1.0, self.settings["gradient_clipping"] / (norm + 1e-6)), self.learning_rate(step)
            for name, weight in weights.items():
                gradient = leaves[name].grad
                assert gradient is not None
                first[name] = 0.9 * first[name] + 0.1 * clip * gradient
                second[name] = 0.95 * second[name] + 0.05 * (clip * gradient) ** 2
                if "norm" not in name:
                    weight *= 1 - rate * self.settings["weight_decay"]
                m, v = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.95 ** (step + 1))
                weight -= rate * m / (v.sqrt() + 1e-8)
            yield float(loss.detach()), norm


def test_steps_of_shares_equal_plain_torch_in_float64(runs: Runs, dataset: Path) -> None:
    """Losses, norms, and the weights after all: rows that a step did not read see AdamW with a gradient of zero."""
    run = runs.train("plain", **PLAIN)
    shares = shares_of_steps(run)
    assert len(shares) == STEPS and set(shares.values()) == set(SHARES), "every share is drawn"
    plain = PlainElasticRun(BASE | PLAIN, batch=8, steps=STEPS)
    weights = {name: weight.double() for name, weight in read_weights(read_checkpoint(run / "global_step0")).items()}
    followed = list(plain.follow_shares(weights, dataset, shares))
    for key, column in (("train/lm_loss", 0), ("train/grad_norm", 1)):
        expected = {step: values[column] for step, values in enumerate(followed, start=1)}
        assert records(run, key) == pytest.approx(expected, rel=1e-5), key
    for layer in read_states(read_checkpoint(run / f"global_step{STEPS}")):
        for name, state in layer.by_global_name():
            assert state.master is not None
            torch.testing.assert_close(state.master.double(), weights[name], rtol=1e-4, atol=2e-6)
    model = load_config([runs.config("plain", **PLAIN)]).run.model
    flops = sum(training_flops(model_of_share(model, share), 512, 16) for share in shares.values())
    assert records(run, "training_flops")[STEPS] == pytest.approx(flops * 8 * 16, rel=1e-12)


def test_the_loss_of_two_passes_is_that_of_both(runs: Runs, dataset: Path) -> None:
    """Each term of the first step by plain torch in float64, and the sum of every step's."""
    both = runs.train("always", elastic=MODES["always"])
    loss, whole, divergence = (records(both, f"train/{key}") for key in ("loss", "lm_loss", "distillation_loss"))
    shares = shares_of_steps(both)
    own = {step: records(both, f"train/lm_loss_share_{share:g}")[step] for step, share in shares.items()}
    assert set(shares.values()) == {0.25, 0.5}
    for step in shares:
        expected = (whole[step] + 0.6 * own[step] + 0.4 * divergence[step]) / 2
        assert loss[step] == pytest.approx(expected, rel=1e-6)
    start = read_checkpoint(runs.train("plain", **PLAIN) / "global_step0")
    weights = {name: weight.double() for name, weight in read_weights(start).items()}
    samples = sample_order(dataset, BASE, 8)
    tokens = torch.stack([next(samples) for _ in range(8)])
    settings, labels = BASE | {"scales": SCALES}, tokens[:, 1:].flatten()
    full = tokenformer(weights, tokens[:, :-1], settings).flatten(0, 1)
    part = tokenformer(share_of_rows(weights, shares[1]), tokens[:, :-1], settings).flatten(0, 1)
    assert whole[1] == pytest.approx(float(F.cross_entropy(full, labels)), rel=1e-6)
    assert own[1] == pytest.approx(float(F.cross_entropy(part, labels)), rel=1e-6)
    kl = F.kl_div((part / 2).log_softmax(-1), (full / 2).softmax(-1), reduction="batchmean")
    assert divergence[1] == pytest.approx(4 * float(kl), rel=1e-3, abs=1e-6)


@pytest.mark.full  # that seed and step decide what is read: tests/unit/training/test_step_shares.py
@pytest.mark.parametrize("mode", ["always", "alternate"])
def test_a_run_that_was_killed_goes_on_bitwise(mode: str, runs: Runs) -> None:
    """Its last whole checkpoint is that of step 4; what came after is lost, and is the same once more."""
    keys = {"elastic": MODES[mode], "hidden_dropout": 0.1, "checkpoint_factor": 4, "auto_resume": True}
    folder = runs.train(f"{mode}-killed", **keys)
    before, last = curves(folder), folder / f"global_step{STEPS}"
    kept = last.rename(folder.parent / f"{mode}-kept")
    (folder / "latest").write_text("global_step4")
    assert run_ranks(folder.with_suffix(".yml")).code == 0
    assert_same_checkpoint(last, kept)
    assert curves(folder) == before


def test_an_extracted_share_is_evaluated_and_trains_on_as_any_run(runs: Runs, tmp_path: Path) -> None:
    """Masters and moments are rows of the large run's; its loss is that of the share in the large run, by every way."""
    large = runs.train("always", elastic=MODES["always"])
    half = runs.folder / "half"
    assert extract.main(["--input_dir", str(large), "--share", "0.5", "--output_dir", str(half)]) == 0
    small = {name: state for layer in read_states(read_checkpoint(half / f"global_step{STEPS}"))
             for name, state in layer.by_global_name()}  # fmt: skip
    for layer in read_states(read_checkpoint(large / f"global_step{STEPS}")):
        for name, state in layer.by_global_name():
            assert state.master is not None and state.moments.keys() == {"exp_avg", "exp_avg_sq"}
            tensors = {"weight": state.weight, "master": state.master, **state.moments}
            own = small[name]
            found = {"weight": own.weight, "master": own.master, **own.moments}
            for kind, tensor in tensors.items():
                expected = share_of_rows({name: tensor}, 0.5)[name]
                assert torch.equal(found[kind], expected), (name, kind)
    sizes = {"qkv_slot_num": 16, "proj_slot_num": 16, "ffn_slot_num": 24}
    sizes |= {"qkv_scale_base": 32, "proj_scale_base": 32, "ffn_scale_base": 48}
    config = runs.config("half", **sizes, train_iters=STEPS + 2, auto_resume=True)
    losses = []
    for yml, word in ((runs.config("always"), f"load={large}"), (config, f"load={half}")):
        output = tmp_path / f"{len(losses)}.json"
        part = "param_token_share=0.5" if yml != config else "param_token_share=1"
        finished = run_ranks(yml, word, part, f"eval_output={output}", script="tools.validate")
        assert finished.code == 0, finished.output
        losses.append(json.loads(output.read_text())["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    curve = run_ranks(runs.config("always"), f"load={large}", f"eval_output={tmp_path}", script="tools.token_curve")
    assert curve.code == 0, curve.output
    with (tmp_path / "token_curve.csv").open(newline="") as file:
        rows = {float(row["share"]): row for row in csv.DictReader(file)}
    assert sorted(rows) == [0.25, 0.5, 1.0] and (tmp_path / "token_curve.png").stat().st_size > 1000
    assert float(rows[0.5]["value"]) == pytest.approx(losses[1], rel=1e-6)
    assert int(rows[1.0]["parameters"]) - int(rows[0.5]["parameters"]) == 2 * 2 * 32 * (3 * 16 + 16 + 24)
    assert "going on from" in train(config)
    assert sorted(records(half, "train/lm_loss")) == [STEPS + 1, STEPS + 2]


@pytest.mark.full
def test_training_with_what_it_cannot_do_is_refused(write_config: Callable[..., Path]) -> None:
    config = write_config(BASE | {"elastic": MODES["sampled"]})
    refused = run_ranks(config, "param_token_share=0.5")
    assert refused.code == 2 and "Traceback" not in refused.output
    assert "param_token_share: training reads all parameter tokens" in refused.output


@pytest.mark.full
def test_a_teacher_teaches_every_share(runs: Runs) -> None:
    """The loss of a share is its cross entropy, and the whole loss has the teacher's term as in any run."""
    distillation = {"teacher": str(runs.train("plain", **PLAIN)), "weight": 0.3}
    run = runs.train("taught", elastic=MODES["sampled"], distillation=distillation)
    loss, language, divergence = (records(run, f"train/{key}") for key in ("loss", "lm_loss", "distillation_loss"))
    for step, share in shares_of_steps(run).items():
        assert records(run, f"train/lm_loss_share_{share:g}")[step] == language[step]
        assert loss[step] == pytest.approx(0.7 * language[step] + 0.3 * divergence[step], rel=1e-6)
