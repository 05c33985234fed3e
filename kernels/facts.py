"""The facts about a kernel that lowering and profiles need, stated in the file that defines the kernel.

A kernel's file calls :func:`register` right below the kernel. Lowering calls :func:`facts_of` and :func:`facts_named`,
and a profile looks kernels up by name. Neither names any flashpte kernel, so a new kernel changes no file but its own.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

import triton
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.runtime.autotuner import Autotuner

Family = Literal["attention", "matmul", "rest"]


@dataclasses.dataclass(frozen=True)
class KernelFacts:
    """The facts about one kernel.

    Attributes:
        kernel: the jit function.
        family: the part of a model's time that the kernel belongs to.
        early_start: name of the boolean constant which says that the kernel itself waits for the kernels before it, so
            it may start before they end (:func:`flashpte.kernels.launch.dependent_launch`); ``None`` for a kernel that
            never does.
        twin: for a kernel in Gluon, a Triton kernel that reads and writes the same arguments. It takes some of the
            kernel's parameters, with the same names. Inductor cannot read Gluon, so the twin tells it what is written.
    """

    kernel: Any
    family: Family
    early_start: str | None = None
    twin: Any = None

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.kernel.fn.__name__)


_FACTS: dict[str, KernelFacts] = {}


def register(kernel: Any, family: Family, early_start: str | None = None, twin: Any = None) -> None:
    """States the facts about a kernel (see :class:`KernelFacts`).

    Raises:
        ValueError: a fact does not fit the kernel, or another kernel has its name.
    """
    name = kernel.fn.__name__
    if isinstance(kernel, GluonJITFunction) and twin is None:
        raise ValueError(
            f"{name} is written in Gluon and has no twin: Inductor would assume that it writes all arguments"
        )
    parameters = set(kernel.arg_names)
    if twin is not None and not set(twin.arg_names) <= parameters:
        raise ValueError(f"the twin of {name} has other parameters: {sorted(set(twin.arg_names) - parameters)}")
    if early_start is not None and early_start not in parameters:
        raise ValueError(f"{name} has no parameter {early_start}")
    known = _FACTS.get(name)
    if known is not None and known.kernel.fn.__module__ != kernel.fn.__module__:
        raise ValueError(f"{known.kernel.fn.__module__} and {kernel.fn.__module__} both define {name}")
    if twin is not None:
        # Inductor looks up the kernel by its name.
        twin = triton.jit(twin.fn, repr=lambda specialization: name)
    _FACTS[name] = KernelFacts(kernel, family, early_start, twin)


def facts_of(kernel: Any) -> KernelFacts | None:
    """The facts about a jit function, which an autotuner may wrap; ``None`` if it is not registered."""
    if isinstance(kernel, Autotuner):
        kernel = kernel.fn
    facts = _FACTS.get(getattr(getattr(kernel, "fn", None), "__name__", ""))
    return facts if facts is not None and facts.kernel is kernel else None


def facts_named(name: str) -> KernelFacts | None:
    """The facts about the kernel that a program calls ``name``. Inductor may have appended a number to the name."""
    return _FACTS.get(name) or _FACTS.get(re.sub(r"_\d+$", "", name))


def registered() -> tuple[KernelFacts, ...]:
    """The facts about all kernels that have been imported."""
    return tuple(_FACTS.values())
