"""The shared command line and what it prints."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron.config.command_line import load_command_line, parse_command_line
from megatron.errors import ConfigError
from tests.helpers.forkserver import ROOT

HERE = Path(__file__).parent
TOKENFORMER = str(HERE / "published_tokenformer.yml")


def test_files_folder_suffix_and_overrides() -> None:
    command = parse_command_line(["-d", "configs", "150M", "data/pile.yml", "local.json", "seed=1", "a.b=[1, 2]"])
    assert command.files == (Path("configs/150M.yml"), Path("configs/data/pile.yml"), Path("configs/local.json"))
    assert command.overrides == ("seed=1", "a.b=[1, 2]")
    assert not command.answered


@pytest.mark.parametrize("options", [["--conf_dir", "configs"], ["--conf-dir=configs"]])
def test_options_may_stand_anywhere(options: list[str]) -> None:
    command = parse_command_line(["a", *options, "seed=1", "--check", "--world-size", "8", "b=2"])
    assert (command.files, command.overrides) == ((Path("configs/a.yml"),), ("seed=1", "b=2"))
    assert (command.check, command.world_size, command.answered) == (True, 8, True)


@pytest.mark.parametrize("argv", [[], ["seed=1"], ["a.yml", "--world-size", "0"], ["a.yml", "--chekc"]])
def test_senseless_arguments_exit_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_command_line(argv)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_check(capsys: pytest.CaptureFixture[str]) -> None:
    command, loaded = load_command_line([TOKENFORMER, "padded_vocab_size=50304", "--check", "--world-size", "8"])
    assert command.answered
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "the configuration is valid",
        "151,881,216 parameters with a vocabulary of 50,304",
        "micro batch 32 x accumulation 4 x 8 data-parallel ranks = 1,024 samples = 2,097,152 tokens per step",
    ]
    assert err.splitlines() == list(loaded.warnings)


def test_check_finds_a_batch_that_does_not_fit_the_ranks() -> None:
    with pytest.raises(ConfigError, match="3 ranks do not divide"):
        load_command_line([TOKENFORMER, "model_parallel_size=2", "--check", "--world-size", "3"])


def test_effective_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    load_command_line([TOKENFORMER, "seed=7", "train_batch_size=1024", "--print-effective-config"])
    lines = capsys.readouterr().out.splitlines()
    words = {line.split()[0]: line.split()[1:] for line in lines if line.startswith("  ")}
    number = next(n for n, line in enumerate(Path(TOKENFORMER).read_text().splitlines(), 1) if "qkv_slot_num" in line)
    assert words["qkv"] == ["768", f"{TOKENFORMER}:{number}", "qkv_slot_num"]
    assert words["qkv_scale_base"] == ["768", "derived"]
    assert words["layernorm_epsilon"] == ["1e-05", "default"]
    assert words["seed"] == ["7", "command", "line"]
    assert any(line.strip().startswith(f"{TOKENFORMER}:") and "rope_fusion" in line for line in lines)
    # The three sides fix 8 data-parallel ranks.
    assert lines[-1].strip().startswith("micro batch 32 x accumulation 4 x 8 data-parallel ranks = 1,024 samples")


def test_values_are_shown_as_they_would_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    load_command_line([TOKENFORMER, "wandb_run_name='12'", "--print-effective-config"])
    assert '  run_name                        "12"' in capsys.readouterr().out


def test_configuration_imports_neither_torch_nor_numpy() -> None:
    """A mistake in a YAML is found before the seconds that torch takes to import, and on machines without it."""
    modules = sorted(
        ".".join(file.relative_to(ROOT).with_suffix("").parts) for file in (ROOT / "megatron" / "config").rglob("*.py")
    )
    assert "megatron.config.neox.keys.table" in modules
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print([name for name in ('torch', 'numpy', 'deepspeed') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("flags", "overrides"),
    [
        (["--eval_tasks", "piqa", "arc_easy", "seed=1"], {"seed=1", 'eval_tasks=["piqa", "arc_easy"]'}),
        (["--eval-tasks", "--limit", "0.5"], {"eval_tasks=[]", "eval_task_limit=0.5"}),
        (["--iteration", "7"], {"iteration=7"}),
        (["--iteration", "1", "20", "load=a"], {"eval_iterations=[1, 20]", "load=a"}),
        (["--iteration", "all"], {"eval_iterations=all"}),
        (["--iteration", "7", "--eval_tasks", "a"], {"eval_iterations=[7]", 'eval_tasks=["a"]'}),
        (["--eval_batch_size=auto", "--hf-model", "a/b"], {"eval_batch_size=auto", "eval_hf_model=a/b"}),
        (["--eval_num_fewshot", "5", "--eval_task_limit", "9"], {"eval_num_fewshot=5", "eval_task_limit=9"}),
        (
            ["--include_path", "t", "--output", "o", "--eval_results_prefix", "p"],
            {"eval_include_path=t", "eval_output=o", "eval_results_prefix=p"},
        ),
    ],
)
def test_flags_of_evaluation_are_overrides(flags: list[str], overrides: set[str]) -> None:
    command = parse_command_line(["a.yml", *flags])
    assert command.files == (Path("a.yml"),)
    assert set(command.overrides) == overrides


def test_evaluation_flags_set_values() -> None:
    flags = ["--eval_tasks", "piqa", "--iteration", "1", "20", "--limit", "0.5", "--eval_batch_size", "4"]
    _, loaded = load_command_line([TOKENFORMER, *flags])
    evaluation = loaded.run.evaluation
    assert (evaluation.tasks, evaluation.iterations) == (["piqa"], [1, 20])
    assert (evaluation.task_limit, evaluation.batch_size) == (0.5, 4)


@pytest.mark.parametrize("flag", [["--iteration", "1", "x"], ["--limit", "1.5"], ["--eval_batch_size", "0"]])
def test_wrong_values_of_flags_are_named_by_their_keys(flag: list[str]) -> None:
    key = {"--iteration": "eval_iterations", "--limit": "eval_task_limit"}.get(flag[0], flag[0].strip("-"))
    with pytest.raises(ConfigError, match=key):
        load_command_line([TOKENFORMER, *flag])
