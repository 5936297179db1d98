"""The start of ranks: by which launcher, and on which machines."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from megatron.config.bounds import LocalCount
from megatron.config.local_path import PathText
from megatron.config.section import Key, OneOf, Section
from megatron.registry import variant_names

NOT_STARTED = {"torchrun"}
"""Launchers whose variables are read, and that deepy.py starts nothing with."""
LauncherName = Annotated[str, OneOf(lambda: sorted(set(variant_names("megatron.launch.launchers")) - NOT_STARTED))]
Word = Annotated[str, Field(max_length=1000, pattern=r"^[ -~]+$")]


class LaunchConfig(Section):
    """Launcher and machines of deepy.py. Ranks that torchrun, srun or mpirun starts by themselves ignore these."""

    launcher: Annotated[
        LauncherName | None,
        Key(
            difference="unset, it is ssh for a hostfile, slurm in an allocation, else local; NeoX's default is pdsh. "
            "pdsh and ssh without a hostfile start ranks on this machine"
        ),
    ] = None
    """What starts the ranks: local, ssh, pdsh, slurm, openmpi, mpich, impi or mvapich."""

    hostfile: Annotated[
        PathText | None, Key(difference="must exist; NeoX goes on without. Its placeholder /mock_path means none")
    ] = None
    """File of machines, `NAME slots=RANKS` on each line. Unset, it is that of the variable DLTS_HOSTFILE, or
    /job/hostfile where there is one."""

    include: Word | None = None
    """Machines of the hostfile to take, and slots on them: `NAME[:SLOT,SLOT...]@NAME...`. `localhost:0,2` takes GPUs of
    this machine."""

    exclude: Word | None = None
    """Machines or slots not to take, in the same words."""

    num_nodes: LocalCount | None = None
    """Machines to take, the first of the hostfile or as many as Slurm gives [machines]; None takes all."""

    num_gpus: Annotated[LocalCount | None, Key(difference="ranks on each machine, also on CPUs")] = None
    """Ranks on each machine [ranks]. None means every slot of the hostfile, the tasks of an allocation, every visible
    GPU of this machine, or one rank on a CPU."""

    master_addr: Word | None = None
    """Address at which rank 0 is reached; None means the first machine."""

    master_port: Annotated[int | None, Key(difference="a free port when unset; NeoX's default is 29500")] = Field(
        default=None, ge=1, le=65535
    )
    """Port on which the ranks meet; None picks a free one on this machine, and draws one for several."""

    comment: Word | None = None
    """Note that srun is given for the job."""

    account: Word | None = None
    """Account that srun is given to charge."""

    no_ssh_check: bool = False
    """Start at once, without trying first whether every machine of the hostfile can be reached."""

    launcher_args: Annotated[list[Word], Key(difference="not a NeoX key; DeepSpeed has a flag of this name")] = Field(
        default=[]
    )
    """Further options of ssh, pdsh, srun or mpirun, as a list of words, such as `[--partition=gpu]`."""

    termination_grace_seconds: Annotated[float, Key(difference="not a NeoX key")] = Field(
        default=30.0, ge=0.0, le=3600.0
    )
    """Time that the other ranks have to end after one has failed, until they are killed [s]."""
