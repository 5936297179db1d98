"""Slurm: srun starts a task for each rank, in the allocation that deepy.py runs in, or in one that srun asks for."""

from __future__ import annotations

import re
import subprocess

from megatron.errors import ConfigError, EnvironmentSetupError
from megatron.launch.launcher import LAUNCHERS, Command, Environment, Job, Launcher, LauncherVariables, Place, Start
from megatron.launch.messages import MESSAGES_VARIABLE
from megatron.launch.nodes import PORTS
from megatron.launch.tasks import require_equal_machines, require_whole_machines, tell_tasks

JOB_VARIABLE = "SLURM_JOB_ID"
INTERACTIVE_STEP = "4294967290"
"""SLURM_STEP_ID of the shell that salloc opens."""

# Step-level variables describe the srun that started this process; job-level ones may describe a bigger allocation.
STEP = LauncherVariables("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
BINDING_VARIABLES = ("SLURMD_TRES_BIND", "SLURM_TRES_BIND", "SLURM_GPU_BIND")
"""What Slurm says of the GPUs of a task, such as gpu:per_task:1 or gpu:none."""
_LIST_OF_HOSTS = re.compile(r"[^,\[]+(?:\[[^\]]*\][^,\[]*)*")
_FIRST_IN_BRACKETS = re.compile(r"\[([^\],-]+)[^\]]*\]")


def slurm_place(environment: Environment) -> Place | None:
    """Reads the variables of the step. A task that is bound to GPUs of its own sees those alone, from number 0."""
    place = STEP(environment)
    if place is None or environment.get("SLURM_STEP_ID") == INTERACTIVE_STEP:
        return None
    return Place(place.rank, place.world_size, 0) if has_own_gpus(environment) else place


def has_own_gpus(environment: Environment) -> bool:
    """Tells whether each task sees only GPUs of its own, as with --gpus-per-task and --gpu-bind=single."""
    binding = " ".join(environment.get(name, "") for name in BINDING_VARIABLES)
    if re.search(r"per_task|single", binding):
        return True
    # Bound in another way, such as by a map, a task may see less than all.
    seen = environment.get("SLURM_STEP_GPUS", "").split(",")
    return bool(re.search(r"gpu:(?!none)", binding)) and len(seen) <= int(environment["SLURM_LOCALID"])


def slurm_meeting_point(environment: Environment) -> tuple[str, int] | None:
    """Returns the first machine of the step, on which rank 0 is, and a port by the numbers of job and step."""
    if "SLURM_STEP_NODELIST" not in environment:
        return None
    # Steps of a job may run beside each other.
    number = int(environment.get(JOB_VARIABLE, "0")) * 16 + int(environment.get("SLURM_STEP_ID", "0"))
    return first_host(environment["SLURM_STEP_NODELIST"]), PORTS[number % len(PORTS)]


def first_host(hosts: str) -> str:
    """Returns the first of a list such as `rack[1-2]node[03,05-08],login`: rack1node03."""
    first = _LIST_OF_HOSTS.match(hosts)
    if first is None:
        raise EnvironmentSetupError(f"SLURM_STEP_NODELIST={hosts}: not a list of machines. Export MASTER_ADDR.")
    return _FIRST_IN_BRACKETS.sub(r"\1", first[0])


def is_in_allocation(environment: Environment) -> bool:
    """Tells whether a process runs in an allocation in which srun would start ranks elsewhere, or several.

    In one of a single task on this machine, deepy.py starts ranks itself.
    """
    if JOB_VARIABLE not in environment or (STEP(environment) is not None and not _is_interactive(environment)):
        return False
    is_on_a_node = "SLURMD_NODENAME" in environment
    several = any(int(environment.get(name, "1")) > 1 for name in ("SLURM_NTASKS", "SLURM_JOB_NUM_NODES"))
    return several or not is_on_a_node


def _is_interactive(environment: Environment) -> bool:
    return environment.get("SLURM_STEP_ID") == INTERACTIVE_STEP


def start_by_srun(job: Job) -> Start:
    """Prepares srun. Where the tasks meet, they derive from the variables of their step."""
    config = job.config
    options = ["--kill-on-bad-exit=1", f"--chdir={job.folder}"]
    if config.comment is not None:
        options.append(f"--comment={config.comment}")
    if config.account is not None:
        options.append(f"--account={config.account}")
    world_size, counts = _nodes_of_hostfile(job) if job.nodes else _nodes_of_slurm(job)
    variables = {MESSAGES_VARIABLE: "1"}
    if "SLURM_CPUS_PER_TASK" in job.environment:
        # srun does not take it from sbatch.
        variables["SRUN_CPUS_PER_TASK"] = job.environment["SLURM_CPUS_PER_TASK"]
    if config.master_addr is not None:
        variables["MASTER_ADDR"] = config.master_addr
    if config.master_port is not None:
        variables["MASTER_PORT"] = str(config.master_port)
    argv = ("srun", *counts, *options, *config.launcher_args, *job.task_command)
    return Start(world_size, (Command(argv, variables),), tell_tasks)


def _nodes_of_hostfile(job: Job) -> tuple[int, list[str]]:
    require_whole_machines(job.nodes, "srun")
    each = require_equal_machines(job.nodes, "srun")
    hosts = ",".join(node.host for node in job.nodes)
    size = each * len(job.nodes)
    return size, [f"--nodelist={hosts}", f"--nodes={len(job.nodes)}", *_counts(size, each), *_gpus(job, each)]


def _nodes_of_slurm(job: Job) -> tuple[int, list[str]]:
    """Returns the ranks, and srun's options: those of the keys, else those of the allocation."""
    config, environment = job.config, job.environment
    options = [f"--nodelist={config.include.replace('@', ',')}"] if config.include else []
    options += [f"--exclude={config.exclude.replace('@', ',')}"] if config.exclude else []
    if ":" in (config.include or "") + (config.exclude or ""):
        raise ConfigError("include, exclude: srun takes whole machines. Leave the slots out.")
    allocated = int(environment.get("SLURM_JOB_NUM_NODES", "0"))
    nodes = config.num_nodes or allocated or 1
    gpus, tasks = environment.get("SLURM_GPUS_ON_NODE"), int(environment.get("SLURM_NTASKS", "0"))
    if config.num_gpus is None and tasks > allocated and config.num_nodes in {None, allocated}:
        return tasks, [*options, f"--nodes={nodes}", f"--ntasks={tasks}"]
    if config.num_gpus is None and config.num_nodes is None and allocated and not gpus:
        return max(tasks, nodes), [*options, f"--nodes={nodes}", f"--ntasks={max(tasks, nodes)}"]
    each = config.num_gpus or int(gpus or 0)
    if not each:
        raise ConfigError("num_gpus: srun must be told how many ranks each machine is to have. Give the key.")
    return nodes * each, [*options, f"--nodes={nodes}", *_counts(nodes * each, each), *_gpus(job, each)]


def _counts(size: int, each: int) -> list[str]:
    return [f"--ntasks={size}", f"--ntasks-per-node={each}"]


def _gpus(job: Job, each: int) -> list[str]:
    """Returns the option that asks for GPUs, where srun asks for an allocation, and the cluster has any."""
    if JOB_VARIABLE in job.environment:
        return []
    command = ["sinfo", "--noheader", "--format=%G"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except OSError:
        return []
    return [f"--gpus-per-node={each}"] if "gpu" in found.stdout else []


LAUNCHERS.register("slurm")(Launcher(slurm_place, slurm_meeting_point, start_by_srun, "srun", order=2))
