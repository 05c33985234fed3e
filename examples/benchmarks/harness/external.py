"""Peers that have to be brought along: FlashInfer and FlashAttention 3. Where they are missing, that is the result."""

from __future__ import annotations

import functools
import os

import torch

from harness.cases import Case
from harness.inputs import Inputs
from harness.peers import up_to_256
from harness.runner import Runner, Variant

FA3_VARIABLE = "FLASHPTE_BENCH_FA3"


def in_layout(s: tuple[torch.Tensor, ...], layout: str) -> list[torch.Tensor]:
    """Query ``[M, H, D]``, and keys and values in FlashInfer's NHD or HND layout, contiguous."""
    q, k, v = (t[0] for t in s)
    keys = [t.transpose(0, 1).contiguous() if layout == "NHD" else t.contiguous() for t in (k, v)]
    return [q.transpose(0, 1).contiguous(), *keys]


def flashinfer(inputs: Inputs) -> dict[str, Variant]:
    """FlashInfer's calls for a single request: decode on tensor cores, else prefill with either backend."""
    import flashinfer

    case = inputs.case
    found: dict[str, Variant] = {}
    for layout in ("NHD", "HND"):
        sets = [in_layout(s, layout) for s in inputs.live_sets]
        options: dict = {"kv_layout": layout, "sm_scale": case.shape.scale}
        if case.rows == 1:
            decode = functools.partial(flashinfer.single_decode_with_kv_cache, use_tensor_cores=True, **options)
            calls = [lambda s=s, f=decode: f(s[0][0], *s[1:]) for s in sets]
            found[layout] = Variant(calls, lambda result: result[None, :, None])
            continue
        options |= {"causal": True, "window_left": -1 if case.window is None else case.window - 1}
        # The second backend is for Hopper and for many rows, but nothing keeps few rows from it.
        backends = ("fa3",) if case.prefills else ("fa2", "fa3") if layout == "NHD" else ("fa2",)
        for backend in backends:
            prefill = functools.partial(flashinfer.single_prefill_with_kv_cache, backend=backend, **options)
            calls = [lambda s=s, f=prefill: f(*s) for s in sets]
            found[f"{backend} {layout}"] = Variant(calls, lambda result: result.transpose(0, 1)[None])
    return found


@functools.cache
def _fa3_forward():
    path = os.environ.get(FA3_VARIABLE)
    if not path:
        raise ImportError("no library given (--fa3)")
    torch.ops.load_library(path)
    return torch.ops._vllm_fa3_C.fwd


def fa3(inputs: Inputs) -> dict[str, Variant]:
    """FlashAttention 3 as vLLM builds it: packed sequences only; its causal flag is aligned to the bottom right."""
    forward, case = _fa3_forward(), inputs.case
    sets = [[t.transpose(1, 2).flatten(0, 1).contiguous() for t in s] for s in inputs.live_sets]
    lengths = [case.rows, case.live]
    ends = [torch.arange(case.batch + 1, device="cuda", dtype=torch.int32) * n for n in lengths]
    window = (-1, -1) if case.window is None else (case.window - 1, 0)

    def view(result) -> torch.Tensor:
        return result[0].unflatten(0, (case.batch, case.rows)).transpose(1, 2)

    def call(s: list[torch.Tensor], pack: bool | None) -> object:
        return forward(
            *s, None, None, None, None,  # k_new, v_new, q_v, out
            *ends, None, None, None, *lengths,  # cu_seqlens of q, k and k_new, seqused of q and k
            *[None] * 9,  # page table, batch index, left padding, rotary embedding, descaling
            case.shape.scale, case.rows > 1, *window, 0.0, True,  # softcap, interleaved rotary embedding
            None, 0, pack, 0, None, 1, 0, None,  # metadata, splits by itself, margin, sinks, context parallel
        )  # fmt: skip

    packings = {"": None} if case.prefills else {"": None, "packed": True}
    return {name: Variant([lambda s=s, p=p: call(s, p) for s in sets], view) for name, p in packings.items()}


def _single(case: Case) -> str | None:
    return up_to_256(case) or ("one request at a time" if case.batch > 1 else None)


def _by_module(case: Case) -> object:
    return case.shape.head_dim, case.prefills, case.window is None


RUNNERS = (
    Runner("flashinfer", _single, flashinfer, group=_by_module),
    Runner("fa3", up_to_256, fa3, parts=0),
)
