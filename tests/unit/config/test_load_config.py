"""From published-style YAMLs and overrides to the typed configuration."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.config.load_config import LoadedConfig, load_config
from megatron.config.sections.run_config import RunConfig, config_text
from megatron.errors import ConfigError

HERE = Path(__file__).parent
TOKENFORMER = HERE / "published_tokenformer.yml"
PYTHIA = HERE / "published_pythia.yml"

Loader = Callable[..., LoadedConfig]


def value_at(run: RunConfig, path: str) -> object:
    value: object = run
    for name in path.split("."):
        value = getattr(value, name)
    return value


def test_published_tokenformer() -> None:
    loaded = load_config([TOKENFORMER])
    model, training = loaded.run.model, loaded.run.training
    assert model.architecture == "tokenformer"
    assert model.param_tokens is not None
    assert model.param_tokens.model_dump() == {
        "qkv": 768,
        "proj": 768,
        "ffn": 3072,
        "theta": "l2_norm_gelu",
        "qkv_scale_base": 768,
        "proj_scale_base": 768,
        "ffn_scale_base": 3072,
    }
    assert (model.norm, model.final_norm, model.tie_embeddings) == ("layernorm_nonparam", "layernorm", True)
    assert (model.init_method, model.output_layer_init_method) == ("normal", "wang_init")
    assert not model.use_bias_in_mlp
    assert training.precision.model_dump() == {
        "dtype": "fp16",
        "loss_scale": 0,
        "initial_scale_power": 12,
        "loss_scale_window": 1000,
        "hysteresis": 2,
        "min_loss_scale": 1,
    }
    assert (training.optimizer.lr, training.optimizer.betas, training.optimizer.eps) == (6e-4, [0.9, 0.95], 1e-8)
    assert (training.lr_schedule.style, training.lr_schedule.min_lr) == ("cosine", 6e-5)
    assert training.checkpoint_activations.enabled
    assert loaded.run.data.data_path == "./data/pile_text_document"
    assert loaded.run.data.tokenizer.vocab_file == "./tokenizer.json"
    assert loaded.batch(8).global_batch_size == 1024
    assert [warning.split(": ")[0].split()[-1] for warning in loaded.warnings] == [
        "partition_activations",
        "adlr_autoresume",
        "here",
    ]
    assert loaded.warnings[-1].startswith("keys without effect here: ")


def test_published_pythia() -> None:
    loaded = load_config([PYTHIA])
    model = loaded.run.model
    assert model.architecture == "gpt_neox"
    assert model.param_tokens is None
    assert model.activation == "gelu_tanh"
    assert model.parallel_residual
    assert not model.tie_embeddings
    assert model.use_bias_in_attn_linear
    assert model.use_bias_in_mlp
    assert loaded.run.parallel.pipe_parallel_size == 1
    assert loaded.run.parallel.zero.stage == 1
    assert loaded.batch(32).global_batch_size == 1024
    assert any("zero_optimization.stage: 0: read as 1" in warning for warning in loaded.warnings)


def test_trained_models_need_no_stages_and_no_batch() -> None:
    loaded = load_config([PYTHIA], ["model_parallel_size=2", "pipe_parallel_size=3"])
    assert [loaded.replicas(ranks) for ranks in (2, 4, 10)] == [1, 2, 5]
    with pytest.raises(ConfigError, match=r"model_parallel_size x pipe_parallel_size = 2 x 1 = 2\. Start a multiple"):
        loaded.replicas(3)


def test_neox_defaults_apply_where_keys_are_absent(tmp_path: Path) -> None:
    file = tmp_path / "small.yml"
    file.write_text(
        "{num-layers: 2, hidden-size: 8, num-attention-heads: 2, seq-length: 4, max-position-embeddings: 4, "
        "pos-emb: none, train-iters: 3, batch-size: 2, optimizer: {params: {lr: 1e-3}}}"
    )
    run = load_config([file]).run
    defaults = {
        "model.architecture": "gpt_neox",
        "model.norm": "layernorm",
        "model.activation": "gelu",
        "model.rotary_pct": 1.0,
        "model.use_bias_in_attn_linear": True,
        "model.tie_embeddings": True,
        "model.parallel_residual": False,
        "model.init_method": "normal",
        "model.output_layer_init_method": "scaled_normal",
        "model.init_method_std": 0.02,
        "training.lr_schedule.style": "linear",
        "training.lr_schedule.warmup": 0.01,
        "training.lr_schedule.decay_iters": None,
        "training.optimizer.weight_decay": 0.1,
        "training.optimizer.betas": [0.9, 0.999],
        "training.gradient_clipping": 1.0,
        "training.precision.dtype": "fp32",
        "training.seed": 1234,
        "training.eval_iters": 100,
        "monitor.log_interval": 100,
        "data.split": "969, 30, 1",
        "data.tokenizer.type": "GPT2BPETokenizer",
    }
    assert {path: value_at(run, path) for path in defaults} == defaults


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("optimizer.params.lr=1e-3", "training.optimizer.lr", 1e-3),
        ("lr=1e-3", "training.optimizer.lr", 1e-3),
        ("gas=2", "training.gradient_accumulation_steps", 2),
        ("fp16.loss_scale=128", "training.precision.loss_scale", 128.0),
        ("precision=bfloat16", "training.precision.dtype", "bf16"),
        ("bf16.enabled=true", "training.precision.dtype", "bf16"),
        ("no-weight-tying=true", "model.tie_embeddings", False),
        ("norm=non_parametric_layernorm", "model.norm", "layernorm_nonparam"),
        ("extra_save_iters=[5, 10]", "checkpoint.extra_save_iters", [5, 10]),
        ("optimizer={type: adamw, params: {eps: 1e-6}}", "training.optimizer.eps", 1e-6),
        ("save=", "checkpoint.save", None),
        ("save=null", "checkpoint.save", None),
        ("save=a=b", "checkpoint.save", "a=b"),
        ("attention_config=[[[tokenformer], all]]", "model.architecture", "tokenformer"),
        ("sample_input_file=prompts.txt", "generation.text_gen_type", "input-file"),
        ("optimizer.type=adam", "training.optimizer.type", "Adam"),
        ("checkpoint_factor=1.5; checkpoint_scale=log", "checkpoint.checkpoint_factor", 1.5),
        ("lr_decay_iters=null; lr_decay_fraction=0.5", "training.lr_schedule.decay_iters", 71500),
        ("pipe_partition_method=uniform", "parallel.pipe_partition_method", "uniform"),
        ("num_kv_heads=12", "model.num_attention_heads", 12),
        ("intermediate_size=3072", "model.hidden_size", 768),
        ("moe_num_experts=1", "model.num_layers", 12),
        ("flops_profiler={enabled: false}", "model.num_layers", 12),
        ("eval_tasks=", "model.num_layers", 12),
    ],
)
def test_override(override: str, path: str, value: object) -> None:
    assert value_at(load_config([TOKENFORMER], override.split("; ")).run, path) == value


def test_override_wins_over_another_name_of_the_same_value() -> None:
    """The file says fp16 twice, by fp16.enabled and fp16.fp16; the command line need not undo both."""
    loaded = load_config([TOKENFORMER], ["precision=fp32"])
    assert loaded.run.training.precision.dtype == "fp32"
    assert str(loaded.origins["training.precision.dtype"]) == "command line"


def test_older_bf16_switches() -> None:
    for override in ("fp16={type: bfloat16}", "deepspeed_extra_args={bf16: {enabled: true}}"):
        assert load_config([TOKENFORMER], [override]).run.training.precision.dtype == "bf16"


def test_origins() -> None:
    loaded = load_config([TOKENFORMER], ["seed=7"])
    shown = {path: str(origin) for path, origin in loaded.origins.items()}
    lines = TOKENFORMER.read_text().splitlines()
    (heads,) = (number for number, line in enumerate(lines, 1) if "num_attention_heads" in line)
    (slots,) = (number for number, line in enumerate(lines, 1) if "qkv_slot_num" in line)
    assert shown["model.num_attention_heads"] == f"{TOKENFORMER}:{heads}"
    assert shown["model.param_tokens.qkv"] == f"{TOKENFORMER}:{slots}"
    assert shown["model.param_tokens.qkv_scale_base"] == "derived"
    assert shown["model.use_bias_in_mlp"] == "derived"
    assert shown["model.layernorm_epsilon"] == "default"
    assert shown["training.seed"] == "command line"


def test_files_merge(tmp_path: Path) -> None:
    data, cluster = tmp_path / "data.yml", tmp_path / "cluster.yml"
    data.write_text("test_data_weights: null\nseed: 5\n")
    cluster.write_text("# nothing but a comment\n")
    loaded = load_config([PYTHIA, data, cluster])
    assert loaded.run.training.seed == 5
    assert loaded.sources == (PYTHIA, data, cluster)


def test_two_files_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for file in (tmp_path / "x.yml", tmp_path / "a" / "x.yml"):
        file.write_text("{}")
    with pytest.raises(ConfigError, match="another file of this name is given"):
        load_config([tmp_path / "x.yml", tmp_path / "a" / "x.yml"])


@pytest.mark.parametrize("file", [TOKENFORMER, PYTHIA])
def test_text_reads_back(file: Path) -> None:
    run = load_config([file]).run
    assert RunConfig.model_validate_json(config_text(run)) == run
    assert json.loads(config_text(run))["model"]["num_layers"] == 12


def test_unreadable_file() -> None:
    with pytest.raises(ConfigError, match=r"none\.yml: cannot be read: No such file"):
        load_config([Path("none.yml")])


def test_many_kinds_of_error_at_once(tmp_path: Path) -> None:
    """Unknown, refused, mistyped, missing and contradictory keys are reported together."""
    file = tmp_path / "bad.yml"
    file.write_text(
        "num_layers: 2\nhidden_size: 10\nnum_attention_heads: 4\nseq_length: 8\nmax_position_embeddings: '8'\n"
        "pos_emb: alibi\nuse_mup: true\nsede: 1\nmin_lr: 1\nbatch_size: 1\ngas: 1\n"
        "optimizer: {params: {lr: 1e-3, betas: [0.9]}}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config([file])
    assert caught.value.exit_code == 2
    keys = [line.removeprefix(f"{file}:").split(": ")[0] for line in str(caught.value).splitlines()[1:]]
    assert keys == [
        "3 num_attention_heads",
        "5 max_position_embeddings",
        "6 pos_emb",
        "7 use_mup",
        "8 sede",
        "9 min_lr",
        "12 optimizer.params.betas",
        "missing key train_iters",
    ]
