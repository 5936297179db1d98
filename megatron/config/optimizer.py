"""Optimizers without their tensors: sections, names of the state, parameter groups, implementations.

An optimizer is one module in `optimizers/` that registers its facts; `megatron/training` builds it from them, and
`megatron/checkpointing` reads and writes its state by the names that they give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Generic, Literal, Protocol, TypeVar, get_args

from pydantic import SerializerFunctionWrapHandler, model_serializer

from megatron.config.bounds import NonNegative, Positive
from megatron.config.neox_entries import Inert, Rejected
from megatron.config.section import Key, Section
from megatron.registry import Registry, is_installed, require


class OptimizerConfig(Section):
    """Optimizer. The sections of the registered optimizers add their own values."""

    key_prefix = "optimizer.params."

    type: Annotated[
        str,
        Key("optimizer.type", difference="Adam, and Muon, which is not NeoX's; no others"),
    ]
    """Name of the optimizer: a section lists the names that mean it in a Literal."""

    lr: Annotated[Positive, Key(difference="must be given; NeoX's default is 0.001")]
    """Peak learning rate."""

    weight_decay: Annotated[NonNegative, Key("weight_decay")] = 0.1
    """Weight decay."""

    @model_serializer(mode="wrap")
    def _weight_decay_last(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # The order of the configurations that checkpoints hold.
        values: dict[str, Any] = dump(self)
        return {name: values[name] for name in values if name != "weight_decay"} | {
            "weight_decay": values["weight_decay"]
        }


S = TypeVar("S", bound=OptimizerConfig)


class GroupedParameter(Protocol):
    """The properties of a parameter by which its group is chosen."""

    @property
    def decays(self) -> bool:
        """Tells whether weight decay applies: yes for every matrix, no for norms and biases."""

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Returns the shape over all tensor-parallel ranks."""

    @property
    def is_hidden_matrix(self) -> bool:
        """Tells whether it is a matrix between the embedding and the head."""


@dataclass(frozen=True)
class ParameterGroup(Generic[S]):
    """Parameters that the optimizer treats alike."""

    name: str
    takes: Callable[[GroupedParameter], bool]
    """Tells whether a parameter belongs to the group. Each parameter belongs to the first group that takes it."""
    options: Callable[[S], dict[str, Any]]
    """Returns the group's own keyword arguments, such as its weight decay. An `lr_ratio` among them is its learning
    rate as a multiple of the schedule's."""
    moments: tuple[str, ...] | None = None
    """Names of its moments, where the optimizer does not keep the same for all groups."""
    counts_steps: bool = True
    """Whether the optimizer counts the steps of the group, if it counts any."""


@dataclass(frozen=True)
class Implementation(Generic[S]):
    """One class that computes the optimizer's step."""

    factory: str
    """Import path of the class, as in `torch.optim:AdamW`; imported when the optimizer is built."""
    arguments: Callable[[S], dict[str, Any]]
    """Returns the keyword arguments beside the parameter groups."""
    step_count: Literal["parameter", "group"] | None = "parameter"
    """Where the class keeps its count of steps, under the name `step`: in each parameter's state, as a tensor; in the
    parameter group, as an int; or nowhere."""
    step_on_device: bool = False
    """Whether that tensor lies on the parameter's device, as a fused kernel reads it, instead of in host memory."""
    switch: str = ""
    """Key of the section `speedups` (auto, on or off) that switches the class. Without one it is always auto."""
    gpu: Literal["required", "preferred", "irrelevant"] = "irrelevant"
    """Whether the class needs a GPU, or auto leaves it out on a CPU though it would run there."""
    how_to_get_it: str = ""
    """Advice for when its package is missing."""

    @property
    def package(self) -> str:
        """Returns the name of the package that the class comes from."""
        return self.factory.partition(":")[0].partition(".")[0]

    @property
    def is_installed(self) -> bool:
        """Tells whether the class can be imported."""
        return is_installed(self.factory.partition(":")[0])

    def load_factory(self) -> type:
        """Imports the class. Raises EnvironmentSetupError when its package is missing."""
        module, _, name = self.factory.partition(":")
        factory: type = getattr(require(module, self.switch or self.factory, self.how_to_get_it), name)
        return factory


@dataclass(frozen=True, eq=False)
class OptimizerFacts(Generic[S]):
    """Facts of one optimizer."""

    section: type[S]
    """Its section of the configuration. A field without a NeoX name of its own is a key under `optimizer.params`."""

    moments: tuple[str, ...]
    """Names of the tensors of a parameter's shape in torch's state of the optimizer, of all groups."""

    groups: tuple[ParameterGroup[S], ...]
    """Groups of its parameters, in the order of torch's `param_groups`. A group without parameters is left out."""

    implementations: Mapping[str, Implementation[S]]
    """Classes that compute the same step, by the name that a run's log shows. The first is the reference; of
    those that fit a run, the last is used."""

    squared_moments: tuple[str, ...] = ()
    """Those moments that average squares of gradients: a gradient of twice the size makes them four times as large."""

    learning_rates: tuple[str, ...] = ("lr",)
    """Fields that are peak learning rates, which belong to the schedule that a run keeps when it goes on."""

    freezes_rows: bool = True
    """Whether a row can be kept as it is without an effect on the step of others."""

    check: Callable[[S], Iterator[tuple[str, str]]] = lambda section: iter(())
    """Yields (field, what is wrong with its value) for what types cannot say."""

    neox_keys: Mapping[str, Inert | Rejected] = field(default_factory=dict)
    """Further keys that NeoX has under `optimizer.params`, and why they have no effect or are refused."""

    def group_of(self, parameter: GroupedParameter) -> ParameterGroup[S]:
        """Returns the first group that takes a parameter."""
        return next(group for group in self.groups if group.takes(parameter))

    def moments_of(self, parameter: GroupedParameter) -> tuple[str, ...]:
        """Returns the names of a parameter's moments."""
        own = self.group_of(parameter).moments
        return self.moments if own is None else own

    def implementation_of(self, built: Any, section: S) -> Implementation[S]:
        """Returns the implementation that the torch optimizer `built` is.

        Raises ValueError when it is none of them.
        """
        defaults: Mapping[str, Any] = built.defaults
        for implementation in self.implementations.values():
            given = implementation.arguments(section)
            if (
                implementation.is_installed
                and type(built) is implementation.load_factory()
                and all(defaults.get(name, value) == value for name, value in given.items())
            ):
                return implementation
        raise ValueError(f"{type(built).__name__} is no implementation of the optimizer {section.type}")

    @property
    def switches(self) -> tuple[str, ...]:
        """Returns the keys of the section `speedups` that choose an implementation."""
        return tuple(one.switch for one in self.implementations.values() if one.switch)

    @property
    def names(self) -> tuple[str, ...]:
        """Returns the names that `type` may have."""
        return get_args(self.section.model_fields["type"].annotation)


OPTIMIZERS: Registry[OptimizerFacts[Any]] = Registry("optimizer", package="megatron.config.optimizers")

DEFAULT_OPTIMIZER = "adamw"
"""The optimizer of a configuration that names none: NeoX's "Adam"."""


def check_betas(section: Any) -> Iterator[tuple[str, str]]:
    """Yields what is wrong with `betas`, the decays of AdamW's averages, by name and message."""
    if not all(0.0 <= beta < 1.0 for beta in section.betas):
        yield "betas", "expected numbers of at least 0 and below 1"


def registered_optimizers() -> tuple[OptimizerFacts[Any], ...]:
    """Returns the facts of all optimizers, the default one first."""
    return tuple(OPTIMIZERS[name] for name in sorted(OPTIMIZERS, key=lambda name: name != DEFAULT_OPTIMIZER))


def optimizer_facts(name: object) -> OptimizerFacts[Any] | None:
    """Returns the facts of the optimizer that `type` names, in any case; None for an unknown name."""
    for facts in registered_optimizers():
        if str(name).lower() in (known.lower() for known in facts.names):
            return facts
    return None


def facts_of(section: OptimizerConfig) -> OptimizerFacts[Any]:
    """Returns the facts of a configured optimizer. Raises ValueError for a section of an unknown one."""
    facts = optimizer_facts(section.type)
    if facts is None:
        raise ValueError(f"unknown optimizer {section.type!r}")
    return facts


def read_optimizer_section(value: Any) -> OptimizerConfig:
    """Builds the section of the optimizer that the values of an `optimizer` section name.

    Raises pydantic's ValidationError for wrong values, and ValueError for an unknown optimizer.
    """
    if isinstance(value, OptimizerConfig):
        return value
    name = value.get("type") if isinstance(value, Mapping) else None
    facts = OPTIMIZERS[DEFAULT_OPTIMIZER] if name is None else optimizer_facts(name)
    if facts is None:
        known = [name for optimizer in registered_optimizers() for name in optimizer.names]
        raise ValueError(f"unknown optimizer {name!r}; known: {', '.join(known)}")
    section: OptimizerConfig = facts.section.model_validate(value)
    return section
