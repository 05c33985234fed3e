"""The rewrite of products with quantized weights: each becomes one kernel that reads the packed codes."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.fx import Node

import flashpte.kernels.linear  # noqa: F401  (registers the operators)
from flashpte.kernels.contract import SUPPORTED_DTYPES
from flashpte.kernels.linear.format import Groupwise, PackedFormat, PackedWeight, pack
from flashpte.passes.graph.insert import insert_before
from flashpte.passes.graph.subclasses import unwrap_weights
from flashpte.passes.graph.values import val
from flashpte.passes.linear.affine import Codes, NotQuantized, QuantizedWeight, quantized_weight
from flashpte.passes.linear.find import Product, find_product
from flashpte.passes.linear.known import Known
from flashpte.passes.rewrite import Decision, Refusal, Rewrite, Scope


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A product's packed weight and its name."""

    packed: PackedWeight
    fmt: PackedFormat
    name: str


def _known(scope: Scope) -> Known:
    return Known(scope.graph, scope.run.weights.held if scope.run.weights is not None and _is_root(scope) else {})


def _codes(scope: Scope) -> Codes:
    return Codes()


def _is_root(scope: Scope) -> bool:
    return scope.module is scope.run.graph_module


class LinearRewrite(Rewrite):
    """Replaces products with 4-bit and 8-bit weights by kernels that read the codes.

    The packed weight takes the place of the one that the program held, under its name with the suffix ``_packed``.
    """

    name = "linear"

    def prepare(self, program: ExportedProgram) -> ExportedProgram:
        """Replaces torchao's tensor subclasses by the tensors that they hold."""
        return unwrap_weights(program)

    def match(self, node: Node, scope: Scope) -> Product | None:
        """A product whose second operand is a weight."""
        product = find_product(node)
        if product is None:
            return None
        is_weight = scope.state(_known).is_known(product.weight) or scope.state(_codes).held_by(product.weight)
        return product if is_weight else None

    def decide(self, match: Product, scope: Scope) -> Decision | Refusal:
        """Reads the weight, and packs it if the kernels take it; or says why they do not."""
        known, x = scope.state(_known), val(match.x)
        if not _is_root(scope):
            return Refusal("it is in a branch or region, whose weights are not repacked")
        if not known.is_known(match.weight):
            return Refusal("its codes, scale or zero point are not known when the program is compiled")
        if not isinstance(x, FakeTensor):
            return Refusal("it is inside torch.vmap")
        try:
            weight = quantized_weight(match.weight, match.transposed, known)
        except NotQuantized as why:
            return Refusal(f"the weight stays as it is: {why}")
        finally:
            known.forget()
        if x.dtype not in SUPPORTED_DTYPES or val(match.node).dtype != x.dtype:
            return Refusal(f"x is {x.dtype} and the result {val(match.node).dtype}")
        if match.bias is not None and (reason := _why_not_bias(val(match.bias), x.dtype, len(weight.codes))):
            return Refusal(reason)
        fmt = _format(weight, x.dtype)
        natural = Groupwise(
            weight.codes,
            weight.scales.to(fmt.scale_dtype),
            None if weight.zeros is None else weight.zeros.to(fmt.scale_dtype),
        )
        zeros = "with zero points" if fmt.has_zeros else "symmetric"
        group = "per row" if fmt.per_channel else f"per {fmt.group} columns"
        reason = f"{fmt.bits}-bit weight [{fmt.out_features}, {fmt.in_features}], {zeros}, a scale {group}"
        return Decision(reason, _Plan(pack(natural, fmt), fmt, _name(weight.source, scope)))

    def apply(self, match: Product, decision: Decision, scope: Scope) -> None:
        """Puts the operator in the product's place, and the packed weight in that of the codes."""
        plan: _Plan = decision.plan
        weights = scope.run.weights
        assert weights is not None
        # An earlier match may have replaced x or the bias.
        current = find_product(match.node)
        assert current is not None
        mode = val(match.x).fake_mode  # type: ignore[attr-defined]
        held: list[Any] = []
        for part, tensor in zip(("packed", "scales", "zeros", "offsets"), plan.packed, strict=True):
            if tensor is None:
                held.append(None)
            else:
                fake = mode.from_tensor(tensor, static_shapes=True)
                held.append(weights.add(scope.graph, f"{plan.name}_{part}", tensor, fake))
        fmt = plan.fmt
        numbers = (fmt.bits, fmt.group, fmt.out_features, fmt.in_features)
        target = torch.ops.flashpte.quantized_linear.default
        node = insert_before(match.node, target, (current.x, *held, current.bias, *numbers), val(match.node))
        match.node.replace_all_uses_with(node)
        scope.graph.erase_node(match.node)
        # The signatures of a program and of its modules refer to outputs by name.
        node.name = match.node.name


def _why_not_bias(bias: torch.Tensor, dtype: torch.dtype, rows: int) -> str | None:
    if bias.dtype != dtype:
        return f"the bias is {bias.dtype}, x {dtype}"
    if tuple(bias.shape) != (rows,) or not bias.is_contiguous():
        return f"the bias is not a contiguous tensor of {rows} numbers"
    return None


def _format(weight: QuantizedWeight, dtype: torch.dtype) -> PackedFormat:
    """The packed format; scales are in the dtype of x if it holds them exactly, else in float32."""
    n, k = weight.codes.shape
    numbers = [weight.scales] if weight.zeros is None else [weight.scales, weight.zeros]
    exact = all(bool((tensor.to(dtype).to(torch.float32) == tensor).all()) for tensor in numbers)
    return PackedFormat(weight.bits, weight.group, n, k, weight.zeros is not None, dtype if exact else torch.float32)


def _name(node: Node, scope: Scope) -> str:
    """The name of the weight that a node is computed from: that of its first placeholder."""
    weights = scope.run.weights
    assert weights is not None
    while node.op != "placeholder":
        if not node.all_input_nodes:
            return node.name  # made in the graph, of numbers alone
        node = node.all_input_nodes[0]
    name = weights.name_of(node)
    # torch.export names the parts of a tensor subclass so.
    owner, found, _ = name.rpartition(".parametrizations.")
    return f"{owner}.{name[len(owner) + len(found) :].split('.')[0]}" if found else name
