"""What lowering and a profile have to know about a kernel, told by the file that defines the kernel.

A kernel's file calls :func:`register` right below the kernel. Lowering asks :func:`facts_of` and :func:`facts_named`, a
profile asks by name: neither knows a kernel of ours, and a new kernel changes no file but its own.
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
        family: which part of a model's time the kernel belongs to.
        early_start: the boolean constant by which a launch says that the kernel waits by itself for the kernels before
            it, so that it may start before they end (:func:`flashpte.kernels.launch.dependent_launch`); ``None`` for a
            kernel that never does.
        twin: for a kernel in Gluon, a Triton kernel which reads and writes the same arguments. It takes some of the
            kernel's parameters, by their names. Inductor cannot read Gluon, and learns from the twin what is written.
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
        raise ValueError(f"{name} is written in Gluon and has no twin: Inductor would take all arguments for written")
    parameters = set(kernel.arg_names)
    if twin is not None and not set(twin.arg_names) <= parameters:
        raise ValueError(f"the twin of {name} has other parameters: {sorted(set(twin.arg_names) - parameters)}")
    if early_start is not None and early_start not in parameters:
        raise ValueError(f"{name} has no parameter {early_start}")
    known = _FACTS.get(name)
    if known is not None and known.kernel.fn.__module__ != kernel.fn.__module__:
        raise ValueError(f"{known.kernel.fn.__module__} and {kernel.fn.__module__} both define {name}")
    if twin is not None:
        # Inductor looks for the kernel by its name.
        twin = triton.jit(twin.fn, repr=lambda specialization: name)
    _FACTS[name] = KernelFacts(kernel, family, early_start, twin)


def facts_of(kernel: Any) -> KernelFacts | None:
    """The facts about a jit function, also where a list of configurations wraps it; ``None`` for an unknown one."""
    if isinstance(kernel, Autotuner):
        kernel = kernel.fn
    facts = _FACTS.get(getattr(getattr(kernel, "fn", None), "__name__", ""))
    return facts if facts is not None and facts.kernel is kernel else None


def facts_named(name: str) -> KernelFacts | None:
    """The facts about the kernel that a program calls ``name``, to which Inductor appends a number."""
    return _FACTS.get(name) or _FACTS.get(re.sub(r"_\d+$", "", name))


def registered() -> tuple[KernelFacts, ...]:
    """The facts about every kernel that has been imported."""
    return tuple(_FACTS.values())
