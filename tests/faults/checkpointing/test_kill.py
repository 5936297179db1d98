"""Runs that are killed: whatever is on disk then, the next start ends bitwise like a run that nobody touched."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron.checkpointing.store.manifest import describe_file, read_manifest, write_manifest
from tests.helpers.bombs import Bomb
from tests.helpers.faults import kill_in_the_middle_of_a_file, limit_file_size, watch_save
from tests.helpers.interrupted import KILLED, SAVE, assert_ends_like, write
from tests.helpers.records import records
from tests.helpers.runs import run_ranks, start_ranks
from tests.helpers.tensor_files import assert_same_checkpoint

# What rank 0 is about to do to the run's folder when it is killed, and which time it does it.
PHASES: dict[str, tuple[str, int]] = {
    "before the folder": ("os.mkdir ./.global_step4.writing", 0),
    "before the first file": ("open x ./.global_step4.writing/layer_00-model_00-model_states.pt", 0),
    "between files": ("open x ./.global_step4.writing/layer_02-model_00-model_states.pt", 0),
    "before the optimizer": ("open x ./.global_step4.writing/zero_pp_rank_0_mp_rank_00_optim_states.pt", 0),
    "before the state": ("open w ./.global_step4.writing/state.json", 0),
    "before the manifest": ("open w ./.global_step4.writing/manifest.json", 0),
    "before the rename": ("os.rename ./.global_step4.writing", 0),
    "after the rename": ("open None .", 0),
    "before latest": ("open w ./latest.tmp", 0),
    "before latest has its name": ("os.rename ./latest.tmp", 0),
    "after latest": ("open None .", 1),
    "before the old one goes": ("os.rename ./global_step2", 0),
    "while the old one goes": ("os.remove ./.global_step2.removed/layer_02-model_00-model_states.pt", 0),
    "before the old one's folder goes": ("os.rmdir ./.global_step2.removed", 0),
}
COVER = ("before the first file", "before the manifest", "after the rename", "while the old one goes")


def events(untouched: Path) -> list[str]:
    return (untouched.parent / "events").read_text().splitlines()


def event_number(untouched: Path, phase: str) -> int:
    """Returns the number of the event before which a phase ends; phases come in the order of PHASES."""
    seen = events(untouched)
    numbers = {
        name: [number for number, found in enumerate(seen) if found == event][occurrence]
        for name, (event, occurrence) in PHASES.items()
    }
    assert list(numbers.values()) == sorted(numbers.values())
    return numbers[phase]


@pytest.mark.parametrize("phase", COVER)
def test_killed_in_a_phase_of_a_save(phase: str, untouched: Path, dataset: Path, tmp_path: Path) -> None:
    config = write(tmp_path, dataset)
    arguments = (SAVE, None, event_number(untouched, phase))
    assert run_ranks(config, ranks=2, before=watch_save, arguments=arguments).codes == KILLED
    assert_ends_like(untouched, config)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_killed_before_each_single_thing_that_a_save_does(untouched: Path, dataset: Path, tmp_path: Path) -> None:
    for number, event in enumerate(events(untouched)):
        config = write(tmp_path / str(number), dataset)
        killed = run_ranks(config, ranks=2, before=watch_save, arguments=(SAVE, None, number))
        assert killed.codes == KILLED, event
        assert_ends_like(untouched, config)


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.full)])
def test_killed_in_the_middle_of_a_file(rank: int, untouched: Path, dataset: Path, tmp_path: Path) -> None:
    config = write(tmp_path, dataset)
    killed = run_ranks(config, ranks=2, before=kill_in_the_middle_of_a_file, arguments=(SAVE, rank))
    assert killed.codes == KILLED
    assert list((tmp_path / "run" / ".global_step4.writing").iterdir())
    assert_ends_like(untouched, config)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kills", [1, pytest.param(50, marks=pytest.mark.full)])
def test_killed_at_random_moments(
    kills: int, saved_each_step: Callable[[int], tuple[Path, float]], dataset: Path, tmp_path: Path
) -> None:
    """Each start is killed some steps on, at any moment of a step or the save that follows each."""
    steps = 10 * kills
    theirs, seconds_per_step = saved_each_step(steps)
    changes = {"train_iters": steps, "checkpoint_factor": 1, "keep_last_n_checkpoints": 2, "num_workers": 1}
    config = write(tmp_path, dataset, **changes)
    ours = config.with_suffix("")
    moments = random.Random(5)
    for _ in range(kills):
        target = last_save(ours) + moments.randrange(6)
        ranks = start_ranks(config, ranks=2)
        ranks.wait_for("speed-ups")
        while last_save(ours) < target:
            assert all(process.is_alive() for process in ranks.processes), ranks.output()
            time.sleep(0.001)
        time.sleep(moments.uniform(0.0, 2 * seconds_per_step))
        assert all(process.is_alive() for process in ranks.processes), ranks.output()
        ranks.kill()
    assert run_ranks(config, ranks=2, timeout=1200.0).codes == [0, 0]
    assert_same_checkpoint(ours / f"global_step{steps}", theirs / f"global_step{steps}")
    assert records(ours, "train/lm_loss") == records(theirs, "train/lm_loss")
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}


def last_save(run: Path) -> int:
    """The step that `latest` names, 0 before the first."""
    latest = run / "latest"
    return int(latest.read_text().removeprefix("global_step")) if latest.exists() else 0


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk(rank: int, untouched: Path, dataset: Path, tmp_path: Path) -> None:
    """One rank cannot write: all end with an error, and what was saved before is as it was."""
    config = write(tmp_path, dataset)
    finished = run_ranks(config, ranks=2, before=limit_file_size, arguments=(SAVE, rank, 100_000))
    assert finished.codes == [1, 1], finished.output
    file = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    assert (
        f"the checkpoint of step 4 could not be written to {tmp_path / 'run'}: rank {rank}: {file}" in finished.output
    )
    assert "Traceback" not in finished.output
    assert sorted(path.name for path in (tmp_path / "run").glob("*global_step*")) == ["global_step2"]
    assert (tmp_path / "run" / "latest").read_text() == "global_step2\n"
    assert_ends_like(untouched, config)


def test_a_folder_that_cannot_be_made(untouched: Path, dataset: Path, tmp_path: Path) -> None:
    config = write(tmp_path, dataset)
    obstacle = tmp_path / "run" / ".global_step4.writing"
    obstacle.parent.mkdir()
    obstacle.touch()
    finished = run_ranks(config, ranks=2)
    assert finished.codes == [1, 1]
    assert f"{obstacle}: File exists" in finished.output and "Traceback" not in finished.output
    obstacle.unlink()
    assert_ends_like(untouched, config)


def test_a_read_only_folder(dataset: Path, tmp_path: Path) -> None:
    config = write(tmp_path, dataset)
    finished = run_ranks(config, "save=/sys/kernel/run", ranks=2)  # not even root may write there
    assert finished.codes == [1, 1]
    assert "save: /sys/kernel/run cannot be written" in finished.output and "Traceback" not in finished.output


def test_damage_to_the_newest_checkpoint_costs_its_steps(
    untouched: Path, synchronous: Path, dataset: Path, tmp_path: Path
) -> None:
    config = write(tmp_path, dataset)
    run = Path(shutil.copytree(synchronous, config.with_suffix("")))
    file = run / "global_step6" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    finished = run_ranks(config, ranks=2)
    assert finished.codes == [0, 0]
    message = f"passed over global_step6: {file.name} is damaged: its SHA-256 differs. Going back to global_step4."
    assert message in finished.output
    assert_same_checkpoint(run / "global_step6", untouched / "global_step6")
    assert records(run, "train/lm_loss") == records(untouched, "train/lm_loss")


def test_without_any_whole_checkpoint_nothing_starts_from_zero(untouched: Path, dataset: Path, tmp_path: Path) -> None:
    config = write(tmp_path, dataset)
    run = Path(shutil.copytree(untouched, config.with_suffix("")))
    (run / "global_step6" / "layer_00-model_00-model_states.pt").unlink()
    finished = run_ranks(config, ranks=2)
    assert finished.codes == [1, 1]
    assert "none of its checkpoints is whole" in finished.output
    assert "global_step6: layer_00-model_00-model_states.pt is missing" in finished.output


@pytest.mark.parametrize(
    "name",
    ["layer_01-model_00-model_states.pt", "mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"],
)
@pytest.mark.parametrize("key", ["", "finetune"])
def test_a_pickle_bomb_in_place_of_a_file_does_not_run(
    name: str, key: str, untouched: Path, dataset: Path, tmp_path: Path
) -> None:
    """Even with a manifest that vouches for it."""
    config = write(tmp_path, dataset, train_iters=8)
    path = Path(shutil.copytree(untouched / "global_step6", tmp_path / "run" / "global_step6"))
    torch.save({"module": Bomb(tmp_path / "exploded")}, path / name)
    manifest = read_manifest(path)
    files = dict(manifest.files) | {name: describe_file(path / name)}
    write_manifest(path, replace(manifest, files=files))
    tuning = [f"load={path}", f"save={tmp_path / 'tuned'}", "finetune=true", "auto_resume=false", "eval_iters=0"]
    finished = run_ranks(config, *(tuning if key else []), ranks=2)
    if key and not name.startswith("layer_"):
        assert finished.codes == [0, 0], "weights alone are read"
    else:
        assert finished.codes == [1, 1], finished.output
        assert f"{name} holds more than tensors and plain values" in finished.output
        assert "Traceback" not in finished.output
    assert not (tmp_path / "exploded").exists()
