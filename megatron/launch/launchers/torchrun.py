"""torchrun, whose variables are those that everything here reads; it may itself run under another launcher."""

from __future__ import annotations

from megatron.launch.launcher import LAUNCHERS, Environment, Launcher, Place


def torchrun_place(environment: Environment) -> Place | None:
    """Reads torchrun's variables. LOCAL_RANK may be missing: pods of one GPU each have none."""
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    return Place(int(environment["RANK"]), int(environment["WORLD_SIZE"]), int(environment.get("LOCAL_RANK", "0")))


def is_agent(environment: Environment) -> bool:
    """Tells whether it is torchrun that has set the variables: others set the same ones."""
    return "TORCHELASTIC_RUN_ID" in environment


LAUNCHERS.register("torchrun")(Launcher(torchrun_place, is_parent=is_agent, order=0))
