"""The attention operators: registration, fake and CPU implementations.

An operator's CUDA implementation is its launcher, which AOTInductor traces into. Its CPU implementation is the
reference, and its fake gives shape, dtype and memory layout. All three agree on the layout, because models view the
result: ``.transpose(1, 2).view(...)`` after an attention that returns ``[B, L_q, H, D]`` memory. All three refuse what
:mod:`flashpte.kernels.contract` refuses, before anything is launched.

The operators take the arguments of :func:`operator_call`. Only ``sdpa_dispatch`` takes the second map.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch.library import CustomOpDef, triton_op

from flashpte.kernels import tuning
from flashpte.kernels.call import AttentionCall, GivenMap
from flashpte.kernels.contract import MAX_ROWS, check_attention, check_rows
from flashpte.kernels.dispatch import launch_dispatch
from flashpte.kernels.intervals import as_intervals
from flashpte.kernels.reference import attention_reference
from flashpte.kernels.split_k import launch_split_k
from flashpte.kernels.tiled import launch_tiled


def operator_call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    tiles: torch.Tensor | None,
    tile_counts: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    dim_order: Sequence[int],
    key_bounds: torch.Tensor | None = None,
    key_values: torch.Tensor | None = None,
    few_tiles: torch.Tensor | None = None,
    few_tile_counts: torch.Tensor | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> tuple[AttentionCall, GivenMap, GivenMap]:
    """Turns an operator's arguments into the form that launchers take: the call and two maps.

    Programs are serialized with these arguments, so their names, order and types must not change.

    Args:
        query: ``[B, H_q, L_q, D]``; bfloat16, float16 or float32; D up to 576.
        key: ``[B, H_kv, L_kv, D]``, H_q a multiple of H_kv, same dtype.
        value: ``[B, H_kv, L_kv, D_v]``, same dtype; D_v up to 512.
        attn_mask: 4-dimensional, size 1 where it broadcasts; bool (True = attend) or float (added to the scores).
        tiles, tile_counts: the mask's ``flashpte::tile_map`` (or ``interval_map``), or ``None`` to make it at the call.
        is_causal: aligned to the top left: row ``m`` sees keys ``0..m``. Not allowed together with a mask.
        scale: factor of the scores.
        dim_order: memory order of the result's four dimensions, outermost first.
        key_bounds, key_values: a mask as :class:`flashpte.kernels.intervals.Intervals`, instead of ``attn_mask``.
        few_tiles, few_tile_counts: the map that verify walks if the mask differs between the query heads of a group
            (otherwise it walks prefill's map); ``None`` to make it at the call.
        softcap: c, which makes a scaled score s ``c tanh(s / c)`` before the mask; 0 for none.
        sinks: ``[H_q]``, bfloat16, float16 or float32: a score of each query head that takes part in the softmax and
            has no value. It is not scaled, capped or masked.

    Raises:
        ValueError: ``key_bounds`` and ``key_values`` do not fit.
    """
    intervals = as_intervals(key_bounds, key_values)
    call = AttentionCall(query, key, value, scale, is_causal, dim_order, attn_mask, intervals, softcap, sinks)
    few = GivenMap(few_tiles, few_tile_counts, tuning.SPLIT_K_MAP_BLOCK_N)
    return call, GivenMap(tiles, tile_counts, None), few


def _operator(
    name: str, launch: Callable[..., torch.Tensor], most_rows: int | None = None, split_k: bool = False, maps: int = 1
) -> CustomOpDef:
    """Registers an operator and its implementations.

    Each implementation returns ``[B, H_q, L_q, D_v]``, with zeros in rows that attend to nothing. It raises
    ``ValueError`` for shapes, dtypes, head counts, masks or maps that do not fit, and the message names them.

    Args:
        name: the operator's name.
        launch: launcher that takes an attention call and as many maps as the operator.
        most_rows: the most query rows that the operator takes.
        split_k: whether the first map is for the split-K kernel.
        maps: how many maps the operator takes.
    """
    signature = inspect.signature(operator_call).replace(return_annotation=torch.Tensor)
    if maps == 1:
        taken = [p for name, p in signature.parameters.items() if name not in ("few_tiles", "few_tile_counts")]
        signature = signature.replace(parameters=taken)

    def given(*args: Any, **kwargs: Any) -> tuple[AttentionCall, tuple[GivenMap, ...]]:
        call, first, few = operator_call(**signature.bind(*args, **kwargs).arguments)
        if split_k:
            first = first._replace(block_n=tuning.SPLIT_K_MAP_BLOCK_N)
        return call, (first, few)[:maps]

    def cuda(*args: Any, **kwargs: Any) -> torch.Tensor:
        call, given_maps = given(*args, **kwargs)
        if most_rows is not None:
            check_rows(call.query, most_rows)
        return launch(call, *given_maps)

    def fake(*args: Any, **kwargs: Any) -> torch.Tensor:
        call, given_maps = given(*args, **kwargs)
        check_attention(call, given_maps, most_rows)
        return call.empty_output()

    def cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = fake(*args, **kwargs)
        call, _ = given(*args, **kwargs)
        mask = call.mask if call.intervals is None else call.intervals.dense(call.kv_len)
        masked = (call.query, call.key, call.value, mask, call.is_causal, call.scale)
        return out.copy_(attention_reference(*masked, softcap=call.softcap, sinks=call.sinks))

    # PyTorch infers the schema from the signature.
    setattr(cuda, "__signature__", signature)  # noqa: B010 (functions have no such attribute to a type checker)
    op = cast(CustomOpDef, triton_op(f"flashpte::{name}", cuda, mutates_args=()))
    op.register_fake(fake)
    op.register_kernel("cpu")(cpu)
    return op


sdpa_decode = _operator("sdpa_decode", launch_split_k, 1, split_k=True)
"""Attention of one query row (L_q = 1) over all keys, split-K."""

sdpa_verify = _operator("sdpa_verify", launch_split_k, MAX_ROWS, split_k=True)
"""Attention of a few query rows (L_q up to 16) over all keys, split-K."""

sdpa_prefill = _operator("sdpa_prefill", launch_tiled)
"""Attention of any number of query rows, tiled, skipping masked tiles."""

sdpa_dispatch = _operator("sdpa_dispatch", launch_dispatch, maps=2)
"""Attention of a dynamic number of query rows: :data:`sdpa_verify` up to 16 rows, :data:`sdpa_prefill` above."""
