"""No value of any key crashes the loader: it is accepted or reported."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from megatron.config.build_config import build
from megatron.config.merge_files import gather
from megatron.config.neox.keys.table import neox_keys, nested_keys
from megatron.config.neox.translate import translate
from megatron.config.yaml.problems import Given, Origin, YamlValue

BASES = [Path(__file__).parent / f"published_{name}.yml" for name in ("tokenformer", "pythia", "llama")]
VALUES: list[YamlValue] = [
    True,
    0,
    -1,
    3,
    0.5,
    float("inf"),
    "",
    "x",
    [],
    [1],
    [[["tokenformer"], 12]],
    {},
    {"enabled": True},
]


def problems_of(given: Mapping[str, Given]) -> list[str]:
    translation = translate(given)
    run, wrong = build(translation.settings, translation.refused)
    problems = [str(problem) for problem in translation.problems + wrong]
    assert (run is None) == bool(wrong) or problems
    return problems


@pytest.mark.parametrize(
    "base", [BASES[0], *(pytest.param(base, marks=pytest.mark.full) for base in BASES[1:])], ids=lambda base: base.stem
)
def test_every_key_with_every_kind_of_value(base: Path) -> None:
    given = gather([base], []).given
    assert problems_of(given) == []
    for key in sorted(dict(neox_keys()) | dict.fromkeys(nested_keys())):
        for value in VALUES:
            changed = Given(key, value, Origin("command line"))
            problems = problems_of({**given, key: changed})
            # Whatever else does not fit any more, a problem names a key or says which is missing.
            assert all(str(base) in problem or problem.startswith(("command line", "missing")) for problem in problems)


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.stem)
def test_every_key_may_be_missing(base: Path) -> None:
    given = gather([base], []).given
    required = set()
    for key in given:
        problems = problems_of({name: item for name, item in given.items() if name != key})
        required |= {key} if problems else set()
    own = {
        "published_tokenformer": {"attention_config", "qkv_slot_num", "proj_slot_num", "ffn_slot_num"},
        "published_pythia": {"train_data_paths", "valid_data_paths"},
        "published_llama": {"activation"},
    }
    assert required == {
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "seq_length",
        "max_position_embeddings",
        "pos_emb",
        "train_iters",
        "train_micro_batch_size_per_gpu",
        "optimizer.params.lr",
        "tokenizer_type",  # NeoX's default tokenizer needs a merge_file beside the vocab_file
        *own[base.stem],
    }
