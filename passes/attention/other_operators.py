"""Handles attention operators other than ``scaled_dot_product_attention``.

PyTorch replaces it by a device-specific operator when a program is made functional, and ExecuTorch has its own Triton
operators. These compute the same with other defaults. Operators that do more than attention are reported with a reason.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from flashpte.passes.attention.call import SdpaCall
from flashpte.passes.attention.written import Unserved
from flashpte.passes.graph.planned import Value, planned, planned_size
from flashpte.passes.graph.values import aten_target, same_size, val

aten = torch.ops.aten

_FUSED = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "aten::_scaled_dot_product_attention_math",
)
# These align a causal mask to the top left for any lengths. The others are taken only with as many rows as keys.
_TOP_LEFT = ("aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_attention_math")
_TRITON = ("triton::sdpa", "triton::sdpa_decode_splitk", "triton::sdpa_small_query_splitk")
_NAMED = {
    "flex_attention": "flex_attention is a higher-order operator: its score function and its block mask are code that "
    "Inductor compiles into a separate kernel",
    "flex_attention_backward": "flex_attention is a higher-order operator; its backward is for training",
    "triton::tq4_sdpa": "its keys and values are quantized; the kernels take one of bfloat16, float16, float32",
    "llama::sdpa_with_kv_cache": "the operator also writes a cache",
    "llama::custom_sdpa": "the operator takes its positions as a number and its heads after the length",
    "llama::custom_quantized_sdpa": "its keys and values are quantized",
    "aten::_native_multi_head_attention": "the operator also contains its projections",
    "aten::_transformer_encoder_layer_fwd": "the operator is a whole layer",
    "aten::_flash_attention_forward": "its sequences are packed, each with its own length",
    "aten::_efficient_attention_forward": "its heads are after the length, and its sequences may be packed",
    "aten::_cudnn_attention_forward": "its sequences may be packed",
}


def operator_name(node: Node) -> str:
    """``namespace::name`` of the operator that a node calls, or the name of a higher-order operator."""
    if node.op != "call_function":
        return ""
    target: Any = aten_target(node)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return target.name() if callable(getattr(target, "name", None)) else str(target)
    schema = getattr(target, "_schema", None)
    return schema.name if schema is not None else ""


def named(node: Node) -> Unserved | None:
    """An attention operator that cannot be written as a plain call, with the reason; ``None`` for other nodes."""
    reason = _NAMED.get(operator_name(node))
    return None if reason is None else Unserved(node, reason)


def is_other_attention(node: Node) -> bool:
    """Whether :func:`other_call` can read the node."""
    return operator_name(node) in (*_FUSED, *_TRITON)


def other_call(node: Node) -> SdpaCall | str:
    """The plain call that is equivalent to an operator, or one sentence that says why none is. Plans at most a mask."""
    schema = aten_target(node)._schema
    given: dict[str, Any] = {argument.name: argument.default_value for argument in schema.arguments}
    given |= dict(zip((argument.name for argument in schema.arguments), node.args, strict=False)) | node.kwargs
    mask = given.get("attn_mask", given.get("attn_bias"))
    result, causal, scale = node, given["is_causal"], given.get("scale")
    name = schema.name
    if len(schema.returns) > 1:
        # A trace unpacks all results, used or not.
        items = [user for user in node.users if user.users]
        if len(items) != 1 or items[0].target is not operator.getitem or items[0].args[1] != 0:
            return f"{name} has more than one result that is used"
        (result,) = items
    query, key, value = given["query"], given["key"], given["value"]
    lengths = val(query).shape[-2], val(key).shape[-2]
    if name in _TRITON:
        scale = None if scale == 0.0 else scale
        # A row of the two split-K operators sees all keys, causal or not. A causal triton::sdpa takes as many keys as
        # rows.
        causal = causal and name == "triton::sdpa"
        mask = _bounded(key, mask, given.get("kv_len"))
    if causal and not same_size(*lengths) and name not in _TOP_LEFT:
        return f"{name} is causal for {lengths[0]} rows and {lengths[1]} keys"
    dropout = given.get("dropout_p", 0.0)
    return SdpaCall(result, query, key, value, mask, dropout, causal, scale, given.get("enable_gqa", False))


def _bounded(key: Node, mask: Value | None, kv_len: Node | None) -> Value | None:
    """The mask of a call that reads only the first ``kv_len`` keys."""
    if kv_len is None:
        return mask
    options: dict[str, Any] = {"dtype": torch.int64, "device": val(kv_len).device, "pin_memory": False, "near": key}
    keys = planned(aten.arange.start_step, 0, planned_size(key, 2), 1, **options)
    bound = planned(aten.view.default, kv_len, [1], near=key)
    if val(bound).dtype != torch.int64:
        bound = planned(aten._to_copy.default, bound, dtype=torch.int64, near=key)
    shown = planned(aten.unsqueeze.default, planned(aten.lt.Tensor, keys, bound, near=key), 0, near=key)
    return shown if mask is None else planned(aten.logical_and.default, mask, shown, near=key)
