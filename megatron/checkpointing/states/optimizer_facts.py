from __future__ import annotations

from typing import Any


def moment_names(section: Any) -> tuple[str, ...]:
    return ("exp_avg", "exp_avg_sq")


def group_names(section: Any) -> tuple[str, ...]:
    return ("decaying", "rest")


def group_of(section: Any, spec: Any) -> str:
    return "decaying" if spec.decays else "rest"


def group_options(section: Any, group: str) -> dict[str, Any]:
    return {"weight_decay": section.weight_decay if group == "decaying" else 0.0}
