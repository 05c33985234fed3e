"""A method's inputs and outputs, read from the manifest, and the check of a call against them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flashpte.export.common.errors import UsageError
from flashpte.export.files.dtypes import dtype_name, read_dtype

Size = int | tuple[int, int | None]
"""A static size, or the smallest and largest value of a dynamic size (``None``: no limit)."""


class InputError(UsageError):
    """The tensors of a call do not fit the method."""


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One input or output: its name, dtype and sizes, and the expressions of dynamic sizes, by dimension.

    Sizes with the same expression are equal.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[Size, ...]
    expressions: Mapping[int, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        sizes = [str(s) if isinstance(s, int) else f"{s[0]}..{'' if s[1] is None else s[1]}" for s in self.shape]
        return f"{self.name}: {dtype_name(self.dtype)} [{', '.join(sizes)}]"


@dataclasses.dataclass(frozen=True)
class MethodSignature:
    """A method's tensors in calling order, and the buffers that it writes to, by FQN."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    mutable_buffers: tuple[str, ...] = ()

    @property
    def is_static(self) -> bool:
        """Whether every input has one shape, so that a CUDA graph can hold the call."""
        return all(isinstance(size, int) for spec in self.inputs for size in spec.shape)

    def check(self, inputs: Sequence[Any]) -> None:
        """Compares the tensors of a call with the signature: number, dtypes, ranks, sizes and equal dynamic sizes.

        Raises:
            InputError: an input does not fit; the text names the first such input and what it should be.
        """
        if len(inputs) != len(self.inputs):
            names = ", ".join(map(str, self.inputs))
            raise InputError(f"{self.name} takes {len(self.inputs)} tensors ({names}), {len(inputs)} were given")
        sizes: dict[str, tuple[str, int]] = {}
        for spec, tensor in zip(self.inputs, inputs, strict=True):
            problem = _problem(spec, tensor)
            if problem:
                raise InputError(f"{self.name}: input {spec} was given {problem}")
            for axis, expression in spec.expressions.items():
                other, size = sizes.setdefault(expression, (spec.name, tensor.shape[axis]))
                if tensor.shape[axis] != size:
                    raise InputError(
                        f"{self.name}: {spec.name} has {tensor.shape[axis]} in dimension {axis}, {other} has {size}; "
                        "they must be equal"
                    )


def _problem(spec: TensorSpec, tensor: Any) -> str | None:
    if not isinstance(tensor, torch.Tensor):
        return f"a {type(tensor).__name__}, not a tensor"
    if tensor.dtype != spec.dtype:
        return dtype_name(tensor.dtype)
    fits = len(tensor.shape) == len(spec.shape) and all(map(_fits, tensor.shape, spec.shape))
    return None if fits else f"shape {list(tensor.shape)}"


def _fits(size: int, allowed: Size) -> bool:
    if isinstance(allowed, int):
        return size == allowed
    return allowed[0] <= size and (allowed[1] is None or size <= allowed[1])


def read_signature(name: str, method: Mapping[str, Any]) -> MethodSignature:
    """Reads a method's signature from its entry in the manifest.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: the entry is not as ``export-model`` writes it.
    """
    return MethodSignature(
        name=name,
        inputs=tuple(_read_tensor(entry) for entry in method["inputs"] if "dtype" in entry),
        outputs=tuple(_read_tensor(entry) for entry in method["outputs"] if "dtype" in entry),
        mutable_buffers=tuple(method["mutable_buffers"]),
    )


def _read_tensor(entry: Mapping[str, Any]) -> TensorSpec:
    shape = tuple(size if isinstance(size, int) else (int(size[0]), size[1]) for size in entry["shape"])
    expressions = {int(axis): str(text) for axis, text in entry.get("dynamic", {}).items()}
    return TensorSpec(entry["name"], read_dtype(entry["dtype"]), shape, expressions)
