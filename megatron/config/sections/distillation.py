"""The section `distillation`: training on a teacher's distributions beside the text itself."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron.config.bounds import StepNumber
from megatron.config.local_path import PathText
from megatron.config.section import Key, Section

Divergence = Literal["forward_kl", "reverse_kl", "jensen_shannon"]


class DistillationConfig(Section):
    """Knowledge distillation from a teacher's logits (Hinton, Vinyals and Dean 2015, arXiv:1503.02531).

    The loss is (1 - weight) times the cross entropy plus weight times T^2 D, where D is the divergence of the
    distributions softmax(logits / T) of teacher and student over the tokens of the vocabulary.
    """

    key_prefix = "distillation."

    teacher: Annotated[
        PathText, Key(difference="must be given wherever there is a section distillation; not a NeoX key")
    ]
    """Teacher: a run's folder or one of its global_stepN folders, of any layout, or a Hugging Face folder. Any
    architecture, depth and width; the tokenizer must be the run's own."""

    iteration: StepNumber | None = None
    """Step of the teacher's checkpoint [steps]; None means the newest complete one of its folder."""

    weight: float = Field(default=0.5, gt=0.0, le=1.0)
    """Weight of the distillation term; the cross entropy has 1 minus it."""

    temperature: float = Field(default=1.0, ge=1e-3, le=1e3)
    """Temperature T that the logits of both are divided by. The term is multiplied by T^2, so that its gradient keeps
    its size."""

    divergence: Divergence = "forward_kl"
    """Divergence D: forward_kl is KL(teacher || student), as in Hinton's distillation; reverse_kl is
    KL(student || teacher); jensen_shannon is the mean KL of both to their mean."""

    allow_changed_teacher: bool = False
    """Go on with a run although its checkpoint was not distilled from this teacher."""
