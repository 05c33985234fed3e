"""Evaluates arithmetic on one bool: a node's value where the bool is true and where it is false."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from flashpte.passes.attention.masks.constants import Constants
from flashpte.passes.attention.masks.numbers import Numbers
from flashpte.passes.attention.masks.operands import Path, is_cast, view_source
from flashpte.passes.graph.planned import Value
from flashpte.passes.graph.values import aten_target, val


@dataclasses.dataclass(frozen=True)
class Choice:
    """A node with two values: ``true`` where ``condition``, seen through ``path``, is true, and ``false`` elsewhere."""

    condition: Value
    path: Path
    true: torch.Tensor
    false: torch.Tensor


class Choices(Numbers):
    """Finds nodes that are functions of one bool, and evaluates them for both of its values."""

    def __init__(self, kv_len: int | torch.SymInt, constants: Constants) -> None:
        super().__init__(kv_len, constants)
        self._choices: dict[tuple, Choice | None] = {}

    def choice(self, node: Value, path: Path) -> Choice | None:
        """The two values of a node. A bool that is not a function of another bool has the values true and false."""
        derived = self.derived_choice(node, path)
        if derived is None and val(node).dtype == torch.bool:
            derived = Choice(node, path, _entry(True, node), _entry(False, node))
        return derived

    def derived_choice(self, node: Value, path: Path) -> Choice | None:
        """The two values of a node that is computed elementwise from a bool and constants; ``None`` for other nodes."""
        key = (node, path)
        if key not in self._choices:
            self._choices[key] = self._evaluated(node, path)
            if self._choices[key] is not None:
                self.visited.add(node)
        return self._choices[key]

    def _evaluated(self, node: Value, path: Path) -> Choice | None:
        source = view_source(node)
        if source is not None:
            inner = self.choice(source, (node, *path))
            return inner and dataclasses.replace(inner, true=_entry(inner.true, node), false=_entry(inner.false, node))
        target: Any = aten_target(node)
        if is_cast(node):
            given: list[Any] = [node.args[0]]
        elif (
            isinstance(target, torch._ops.OpOverload)
            and torch.Tag.pointwise in target.tags
            and torch.Tag.nondeterministic_seeded not in target.tags
            and not target._schema.is_mutable
            and not any(isinstance(leaf, Value) for leaf in node.kwargs.values())
        ):
            given = list(node.args)
        else:
            return None
        known: list[tuple[Any, Any]] = []
        condition: tuple[Value, Path] | None = None
        for argument in given:
            if not isinstance(argument, Value):
                known.append((argument, argument))
                continue
            if not isinstance(argument.meta.get("val"), torch.Tensor):
                return None
            constant = self.constant(argument)
            if constant is not None:
                known.append((_entry(constant, argument),) * 2)
                continue
            choice = self.choice(argument, path)
            if choice is None or condition not in (None, (choice.condition, choice.path)):
                return None
            condition = (choice.condition, choice.path)
            known.append((choice.true, choice.false))
        if condition is None:
            return None
        self.visited.add(condition[0])
        values = []
        for arguments in zip(*known, strict=True):
            value = arguments[0] if is_cast(node) else target(*arguments, **node.kwargs)
            if not is_cast(node) and value.dtype != val(node).dtype:
                return None
            values.append(_entry(value, node))
        return Choice(*condition, *values)


def _entry(value: Any, node: Value) -> torch.Tensor:
    """One entry of a node, as a tensor with the same type promotion as the node."""
    shape = (1,) if val(node).dim() else ()
    return torch.as_tensor(value).to("cpu", val(node).dtype).reshape(shape)
