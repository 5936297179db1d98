"""Each refusal names the key that was written, and what it proposes works or it says that there is no way."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from megatron.config.load_config import load_config
from megatron.config.neox.keys.table import find_entry, is_dictionary, is_known, neox_keys
from megatron.config.neox_entries import Inert, MapsTo, Rejected
from megatron.config.optimizer import OPTIMIZERS
from megatron.config.sections.section_fields import fields
from megatron.config.value_types import schema_of
from megatron.errors import ConfigError
from tests.helpers.covers import covered

HERE = Path(__file__).parent
TOKENFORMER, PYTHIA = (HERE / f"published_{name}.yml" for name in ("tokenformer", "pythia"))
ROWS = [line.split("\t") for line in (HERE / "neox_arguments.tsv").read_text().splitlines() if not line.startswith("#")]
NEOX_DEFAULTS = {name: ast.literal_eval(default) for name, default in ROWS}

# Every choice of NeoX's; its names say which key they are of.
NEOX_CHOICES = {
    "activation": "gelu geglu relu softsign swish mish silu reglu swiglu bilinear glu",
    "norm": "layernorm rmsnorm non_parametric_layernorm scalenorm te_rmsnorm te_layernorm",
    "final_norm": "layernorm rmsnorm scalenorm layernorm_nonparam",
    "pos_emb": "learned rotary sinusoidal rpe alibi none",
    "init_method": "normal scaled_normal orthogonal scaled_orthogonal xavier_uniform xavier_normal wang_init",
    "output_layer_init_method": "normal scaled_normal single_residual_scaled_normal",
    "optimizer.type": "adam onebitadam cpu_adam cpu_torch_adam sm3 madgrad_wd sgd lion",
    "tokenizer_type": "GPT2BPETokenizer HFTokenizer HFGPT2Tokenizer SPMTokenizer CharLevelTokenizer TiktokenTokenizer",
    "data_impl": "infer mmap cached",
    "dataset_impl": "gpt2 pairwise online",
    "pack_impl": "packed pack_until_overflow unpacked",
    "train_impl": "normal dpo rm kto reinforce",
    "launcher": "pdsh openmpi mvapich slurm",
    "lr_decay_style": "constant linear cosine exponential",
    "precision": "fp16 fp32 bfloat16",
    "checkpoint_scale": "linear log",
    "zero_optimization.stage": "0 1 2 3",
    "mlp_type": "regular llama",
}
LLAMA = "architecture=llama"
NO_WAY = ("not supported", "not implemented", "is not read", "does not work", "belongs to", "is sequential", "deepy.py")


def refusal(*overrides: str, base: Path = PYTHIA) -> str | None:
    try:
        load_config([base], overrides)
    except ConfigError as error:
        return str(error)
    return None


def base_of(key: str) -> Path:
    """A configuration whose architecture has the key."""
    return TOKENFORMER if key in OF_TOKENFORMER else PYTHIA


BESIDE = {"elastic.shares": ["elastic.full_model=alternate"]}
"""What a single value of a key needs beside it: shares alone have to contain the whole model."""


def wrong_values(key: str) -> list[str]:
    """Values that a key may be given by mistake: of another type, misspelt, and the opposite of NeoX's default."""
    values = ["[[]]", "-7", "0.125", "nonesuch", "true", "false"]
    default = NEOX_DEFAULTS.get(key)
    return values + ([f"{default}s"] if isinstance(default, str) and default else [])


SECTIONS_OF_TOKENFORMER = ("model.param_tokens.", "elastic.", "reading.")
OF_TOKENFORMER = {field.key for path, field in fields().items() if path.startswith(SECTIONS_OF_TOKENFORMER)}
KEYS = sorted({*neox_keys(), *NEOX_DEFAULTS})


@pytest.mark.parametrize("number", covered(list(range(8)), [3]))
def test_every_refusal_names_the_key_that_was_written(number: int) -> None:
    for key in KEYS[number::8]:
        for value in wrong_values(key):
            message = refusal(f"{key}={value}", base=base_of(key))
            if message is None:
                continue
            lines = message.splitlines()[1:] or [message]
            own = [line for line in lines if line.startswith(f"command line {key}: ")]
            # Else the value is one for this key and does not fit another, which the message says.
            block = f"missing key {key.rpartition('.')[0]}."
            assert own or all(key in line or line.startswith(block) for line in lines), (key, value, message)
            assert_remedies_work(key, own)


def assert_remedies_work(key: str, lines: list[str]) -> None:
    for line in lines:
        said = line.partition(f"{key}: ")[2]
        for proposed in re.findall(r"did you mean (.+)\?$", said):
            if "unknown key" in said:
                assert is_known(proposed), line
            else:
                # A suggestion is a value of this key, and alone right.
                again = refusal(f"{key}={proposed}", *BESIDE.get(key, []), base=base_of(key)) or ""
                assert f"command line {key}: " not in again, (line, again)
        for proposed in re.findall(r"\buse ([a-z][a-z0-9_.]*): ([^\s;,\[]+)", said):
            name, wanted = proposed
            assert is_known(name), line
            again = refusal(f"{key}=null", f"{name}={wanted}") or ""
            assert f"command line {name}: " not in again, (line, again)
        for proposed in re.findall(r"\b(?:use|see|give|leave) ([a-z]+_[a-z0-9_.]+)", said):
            assert is_known(proposed.rstrip(".")), line
            assert not isinstance(find_entry(proposed.rstrip(".")), Rejected), line
        if re.search(r"leave (it|the key) out|remove the key", said):
            # That is no remedy where the key asks for another model.
            assert not isinstance(find_entry(key), Inert), line


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key in NEOX_CHOICES for value in NEOX_CHOICES[key].split()]
)
def test_every_choice_of_neox_is_taken_or_said_to_be_missing(key: str, value: str) -> None:
    message = refusal("bias_gelu_fusion=null", f"{key}={value}")
    if message is None or (key, value) == ("tokenizer_type", "GPT2BPETokenizer"):  # it needs a merge_file beside
        return
    assert message.startswith(f"command line {key}: {value}: ")
    assert any(words in message for words in NO_WAY), message
    assert "expected one of" not in message


@pytest.mark.parametrize("key", [key for key, entry in neox_keys().items() if isinstance(entry, Rejected)])
def test_what_is_refused_says_that_it_is_not_here(key: str) -> None:
    entry = neox_keys()[key]
    assert isinstance(entry, Rejected)
    value = {bool: "true", int: "7", float: "0.7", str: "some", list: "[some]"}.get(entry.accepts, "{a: 1}")
    if entry.accepts is bool and True in entry.harmless:
        value = "false"
    is_muons = key.removeprefix("optimizer.params.") in OPTIMIZERS["muon"].neox_keys
    message = refusal(f"{key}={value}", *(["optimizer.type=Muon"] if is_muons else []))
    assert message is not None
    assert "not supported here: " in message
    (line,) = [line for line in message.splitlines() if line.startswith(f"command line {key}")]
    assert_remedies_work(key, [line])


@pytest.mark.parametrize("path", fields())
def test_suggestions_come_from_the_keys_own_values(path: str) -> None:
    key = fields()[path].key
    entry = neox_keys()[key]
    assert isinstance(entry, MapsTo)
    schema = fields()[path].schema if entry.accepts is None else schema_of(entry.accepts)
    for choice in schema.get("enum", []):
        if isinstance(choice, str) and len(choice) > 3:
            message = refusal(f"{key}={choice[:-1]}", base=base_of(key)) or ""
            nearest = re.search(r"did you mean (.+)\?", message)
            assert nearest is None or nearest[1] in schema["enum"], message


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("activation=geglu", "activation: geglu: geglu is not implemented; gelu, gelu_tanh and swiglu are"),
        ("activation=silu", "activation: silu: silu is not implemented; gelu, gelu_tanh and swiglu are"),
        ("activation=geluu", "activation: geluu: expected one of gelu, gelu_tanh, swiglu; did you mean gelu?"),
        ("activation=swiglu architecture=gpt_neox", "swiglu: the architecture gpt_neox has gelu and gelu_tanh alone"),
        ("architecture=llama activation=gelu", "activation: gelu: the architecture llama has swiglu alone"),
        ("use_bias_in_norms=false", None),
        ("norm=rmsnorm use_bias_in_norms=false", None),
        ("norm=layernorm_nonparam use_bias_in_norms=false", None),
        ("norm=rmsnorm final_norm=layernorm use_bias_in_norms=false", None),
        ("norm=te_layernorm", "Transformer Engine is not supported; use norm: layernorm, the same function"),
        (
            "intermediate_size=11008",
            "command line intermediate_size: 11008: known to NeoX, not supported here: only the MLP of llama has "
            "another width than 4 x hidden_size (3072)",
        ),
        (
            "attention_type=groupedquery",
            "command line attention_type: groupedquery: known to NeoX, not supported here with this value: "
            "num_kv_heads alone counts the heads of keys and values",
        ),
        ("num_kv_heads=12", None),
        ("num_kv_heads=4", "num_kv_heads: 4: belongs to architecture: llama, and this is gpt_neox"),
        ("ffn_hidden_size=4", "ffn_hidden_size: 4: belongs to architecture: llama, and this is gpt_neox"),
        (
            f"{LLAMA} num_kv_heads=5",
            "num_kv_heads: 5: does not divide num_attention_heads 12, which share them; nearest",
        ),
        (f"{LLAMA} num_kv_heads=5", "nearest valid value: 4"),
        (f"{LLAMA} num_kv_heads=4 model_parallel_size=4", None),
        (
            f"{LLAMA} num_kv_heads=2 model_parallel_size=4",
            "model_parallel_size: 4: is above num_kv_heads 2, and each rank holds whole heads of keys and values; "
            "nearest valid value: 2",
        ),
        (
            f"{LLAMA} num_kv_heads=6 model_parallel_size=4",
            "model_parallel_size: 4: does not divide num_kv_heads 6, and each rank holds whole heads of keys and "
            "values; nearest valid value: 3",
        ),
        (
            f"{LLAMA} ffn_hidden_size=2050 model_parallel_size=4",
            "ffn_hidden_size: 2050: does not split over model_parallel_size 4; nearest valid value: 2048",
        ),
        (f"{LLAMA} intermediate_size=2048", "give ffn_hidden_size, the width itself"),
        (f"{LLAMA} mlp_multiple_of=64", "give ffn_hidden_size, the width itself"),
        ("activation=swiglu intermediate_size=6144 ffn_hidden_size=6144", "ffn_hidden_size: 6144: contradicts"),
        ("activation=swiglu intermediate_size=6144 ffn_hidden_size=2048", None),
        ("activation=swiglu intermediate_size=6144 expansion_factor=4", "contradicts intermediate_size, as in NeoX"),
        ("mlp_type=llama", "mlp_type: llama: a gate by gelu is not implemented; add activation: silu"),
        ("mlp_type=llama activation=silu", None),
        ("mlp_type=moe", "known to NeoX, not supported here with this value; only regular and llama are accepted"),
        ("launcher=bogus", "expected one of impi, local, mpich, mvapich, openmpi, pdsh, slurm, ssh"),
        ("launcher=slrum", "did you mean slurm?"),
        ("batch_size=0", "command line batch_size: 0: expected a whole number above 0"),
        ("batch_size=9000000", "(batch_size sets train_micro_batch_size_per_gpu"),
        ("lr=-1 lr=true", "command line lr: true: expected a number above 0"),
        ("fp16.enabled=maybe", "command line fp16.enabled: maybe: expected true or false"),
        ("optimizer.params.max_grad_norm=1.0", "use gradient_clipping"),
    ],
)
def test_what_users_ran_into(overrides: str, said: str | None) -> None:
    message = refusal(*overrides.split(" "))
    assert message is None if said is None else message is not None and said in message
    assert message is None or "quotes" not in message
    assert message is None or not message.startswith("2 errors")


@pytest.mark.parametrize(
    ("override", "hidden"),
    [
        ("wandb_host=https://me:hunter2@host", "https://<redacted>@host"),
        ("data_path=s3://ID:hunter2@bucket/pile", "s3://<redacted>@bucket/pile"),
        ("train_data_paths=[a, 'https://host/a?X-Amz-Signature=hunter2']", "Signature=<redacted>"),
        ("load=https://hunter2@host/a", "https://<redacted>@host/a"),
        ("wandb_api_key=hunter2", "wandb_api_key: <redacted>: unknown key"),
        ("wandb_api_key=[hunter2", "wandb_api_key: <redacted>: not valid YAML"),
        ("wandb={api_key: hunter2}", '{"api_key": "<redacted>"}'),
        ("wandb.api_key=hunter2", "wandb.api_key: <redacted>: known to NeoX, not supported"),
        ("s3={secret: [hunter2], user: hunter2}", "s3: "),
        ("HF_TOKEN=hunter2", "HF_TOKEN: <redacted>: unknown key"),
        ("nonesuch=https://me:hunter2@host", "nonesuch: https://<redacted>@host: unknown key"),
    ],
)
def test_secrets_are_neither_shown_nor_taken(override: str, hidden: str) -> None:
    message = refusal("train_data_paths=null", "valid_data_paths=null", "test_data_paths=null", override)
    assert message is not None
    assert hidden in message
    if "user" not in override:
        assert "hunter2" not in message


def test_a_mistyped_known_key_still_shows_its_value() -> None:
    assert refusal("maximum_tokens='64'") == (
        'command line maximum_tokens: "64": expected a whole number above 0; remove the quotes'
    )


def test_null_clears_a_key_and_all_in_it() -> None:
    loaded = load_config(
        [PYTHIA], ["fp16=null", "bf16.enabled=true", "zero_optimization=null", "optimizer.params.eps=null"]
    )
    training = loaded.run.training
    assert (training.precision.dtype, training.precision.initial_scale_power) == ("bf16", 16)
    assert training.optimizer.lr == 6e-4
    assert str(loaded.origins["training.precision.hysteresis"]) == "default"
    assert not any("zero_optimization" in note for note in loaded.inert)
    assert refusal("optimizer=null") == (
        "missing key optimizer.params.lr: expected a number above 0; must be given; NeoX's default is 0.001"
    )


def test_null_clears_what_no_table_knows(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.yml"
    foreign.write_text("row_model_parallel_size: 1\nstage_args: {key: 1}\ncomms_logger: {enabled: true}\n")
    with pytest.raises(ConfigError, match="2 errors"):
        load_config([PYTHIA, foreign])
    loaded = load_config([PYTHIA, foreign], ["row_model_parallel_size=null", "stage_args=null", "comms_logger=null"])
    assert not any("comms_logger" in warning for warning in loaded.warnings)
    assert refusal("sede=null") == "command line sede: null: unknown key; did you mean seed?"


def test_the_last_of_a_key_on_the_command_line_counts() -> None:
    loaded = load_config([PYTHIA], ["seed=1", "fp16.hysteresis=3", "seed=2", "fp16={hysteresis: 4}", "seed=2"])
    assert loaded.run.training.seed == 2
    assert loaded.run.training.precision.hysteresis == 4
    assert loaded.warnings[:2] == (
        "command line seed: 2: counts as the last of the command line, in place of 1",
        "command line fp16.hysteresis: 4: counts as the last of the command line, in place of 3",
    )
    assert load_config([PYTHIA], ["fp16.hysteresis=3", "fp16=null"]).run.training.precision.hysteresis == 2


def test_every_key_without_effect_is_named() -> None:
    loaded = load_config([PYTHIA])
    named = "\n".join(loaded.warnings)
    lines = [line for line in PYTHIA.read_text().replace("-", "_").splitlines() if not line.lstrip().startswith("#")]
    written = set(re.findall(r'"(\w+)":', "\n".join(lines)))
    without = {key for key in written if isinstance(neox_keys().get(key), Inert) and not is_dictionary(key)}
    assert without
    assert {key for key in without if f" {key}" not in named} == set()
