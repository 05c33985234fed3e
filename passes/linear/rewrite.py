"""The rewrite of products and lookups with quantized weights: one kernel each, which reads the packed codes."""

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
from flashpte.passes.linear.find import Lookup, Product, find_lookup, find_product
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
    """Replaces products with 4-bit and 8-bit weights, and rows of such tables, by kernels that read the codes.

    The packed weight takes the place of the one that the program held, under its name with the suffix ``_packed``. A
    table that is also the weight of a product, such as a tied output projection, is packed once.
    """

    name = "linear"

    def prepare(self, program: ExportedProgram) -> ExportedProgram:
        """Replaces torchao's tensor subclasses by the tensors that they hold."""
        return unwrap_weights(program)

    def match(self, node: Node, scope: Scope) -> Product | Lookup | None:
        """A product whose second operand is a weight, or a lookup in a table that is not dense."""
        match = find_product(node) or find_lookup(node)
        if match is None:
            return None
        if isinstance(match, Lookup) and match.weight.op == "placeholder":
            return None  # a plain embedding is no news
        is_weight = scope.state(_known).is_known(match.weight) or scope.state(_codes).held_by(match.weight)
        return match if is_weight else None

    def decide(self, match: Product | Lookup, scope: Scope) -> Decision | Refusal:
        """Reads the weight, and packs it if the kernels take it; or says why they do not."""
        known = scope.state(_known)
        given, dtype = val(_given(match)), val(match.node).dtype
        if not _is_root(scope):
            return Refusal("it is in a branch or region, whose weights are not repacked")
        if not known.is_known(match.weight):
            return Refusal("its codes, scale or zero point are not known when the program is compiled")
        if not isinstance(given, FakeTensor):
            return Refusal("it is inside torch.vmap")
        try:
            weight = quantized_weight(match.weight, match.transposed, known)
        except NotQuantized as why:
            return Refusal(f"the weight stays as it is: {why}")
        finally:
            known.forget()
        if (reason := _why_not(match, dtype, len(weight.codes))) is not None:
            return Refusal(reason)
        fmt = _format(weight, dtype)
        natural = Groupwise(
            weight.codes,
            weight.scales.to(fmt.scale_dtype),
            None if weight.zeros is None else weight.zeros.to(fmt.zeros_dtype),
        )
        zeros = "with zero points" if fmt.has_zeros else "symmetric"
        group = "per row" if fmt.per_channel else f"per {fmt.group} columns"
        reason = f"{fmt.bits}-bit weight [{fmt.out_features}, {fmt.in_features}], {zeros}, a scale {group}"
        return Decision(reason, _Plan(pack(natural, fmt), fmt, _name(weight.source, scope)))

    def apply(self, match: Product | Lookup, decision: Decision, scope: Scope) -> None:
        """Puts the operator in the place of the product or lookup, and the packed weight in that of the codes."""
        plan: _Plan = decision.plan
        weights = scope.run.weights
        assert weights is not None
        mode = val(_given(match)).fake_mode  # type: ignore[attr-defined]
        held: list[Any] = []
        for part, tensor in zip(("packed", "scales", "zeros", "offsets"), plan.packed, strict=True):
            if tensor is None:
                held.append(None)
            else:
                fake = mode.from_tensor(tensor, static_shapes=True)
                held.append(weights.add(scope.graph, f"{plan.name}_{part}", tensor, fake))
        target, arguments = _operator(match.node, held, plan.fmt)
        node = insert_before(match.node, target, arguments, val(match.node))
        match.node.replace_all_uses_with(node)
        scope.graph.erase_node(match.node)
        # The signatures of a program and of its modules refer to outputs by name.
        node.name = match.node.name


def _given(match: Product | Lookup) -> Node:
    """What the caller's data come in by: x, or the indices."""
    return match.x if isinstance(match, Product) else match.indices


def _operator(node: Node, held: list[Any], fmt: PackedFormat) -> tuple[Any, tuple[Any, ...]]:
    """The operator for a product or a lookup, and its arguments; an earlier match may have replaced some of them."""
    numbers = (fmt.bits, fmt.group, fmt.out_features, fmt.in_features)
    product, lookup = find_product(node), find_lookup(node)
    if product is not None:
        return torch.ops.flashpte.quantized_linear.default, (product.x, *held, product.bias, *numbers)
    assert lookup is not None
    return torch.ops.flashpte.quantized_embedding.default, (lookup.indices, *held, val(node).dtype, *numbers)


def _why_not(match: Product | Lookup, dtype: torch.dtype, rows: int) -> str | None:
    """Why the kernels do not take the data of a product or a lookup with a result of ``dtype``, or ``None``."""
    given = val(_given(match))
    if isinstance(match, Lookup):
        if given.dtype not in (torch.int32, torch.int64):
            return f"indices are {given.dtype}"
        return None if dtype in SUPPORTED_DTYPES else f"the result is {dtype}"
    if given.dtype not in SUPPORTED_DTYPES or dtype != given.dtype:
        return f"x is {given.dtype} and the result {dtype}"
    return None if match.bias is None else _why_not_bias(val(match.bias), dtype, rows)


def _why_not_bias(bias: torch.Tensor, dtype: torch.dtype, rows: int) -> str | None:
    if bias.dtype != dtype:
        return f"the bias is {bias.dtype}, x {dtype}"
    if tuple(bias.shape) != (rows,) or not bias.is_contiguous():
        return f"the bias is not a contiguous tensor of {rows} numbers"
    return None


def _format(weight: QuantizedWeight, dtype: torch.dtype) -> PackedFormat:
    """The packed format. Scales get the dtype of x, the other one of 16 bits or float32: the first that is exact."""
    n, k = weight.codes.shape
    zeros = weight.zeros
    whole = zeros is not None and bool(((zeros == zeros.round()) & (zeros >= 0) & (zeros <= 1 << weight.bits)).all())
    numbers = [weight.scales] if zeros is None or whole else [weight.scales, zeros]
    for chosen in (dtype, torch.bfloat16, torch.float16, torch.float32):
        if all(bool((tensor.to(chosen).to(torch.float32) == tensor).all()) for tensor in numbers):
            break
    return PackedFormat(weight.bits, weight.group, n, k, zeros is not None, chosen, whole_zeros=whole)


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
