"""Registers and shared memory of every kind of tile in the tables, read from cubins; only spills listed here occur."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import re
from collections.abc import Callable

import pytest
import torch
from compile_only import Compiled, compiling_for

from flashpte.kernels import tuning
from flashpte.kernels.call import AttentionCall
from flashpte.kernels.contract import MAX_V_HEAD_DIM
from flashpte.kernels.intervals import Intervals
from flashpte.kernels.split_k import launch_split_k
from flashpte.kernels.tiled import launch_tiled

ARCHES = ("sm_80", "sm_89", "sm_90")
LIKE_SM_89 = ("sm_86", "sm_120")  # they have as little shared memory
HEAD_DIMS = (64, 128, 256, 512)
KEYS, HEADS_KV = 4096, 2
MAIN = ("_split_k_kernel", "_tiled_kernel", "_hopper_kernel")


@dataclasses.dataclass(frozen=True)
class Call:
    """A launcher, query rows, and query heads per key/value head; together they choose a tile."""

    launch: Callable[..., torch.Tensor]
    q_len: int
    group: int
    keys: int = KEYS


CALLS = {
    "decode": Call(launch_split_k, 1, 8),
    "verify 5": Call(launch_split_k, 5, 8),
    "verify 16": Call(launch_split_k, 16, 8),
    "prefill 33": Call(launch_tiled, 33, 2),  # fewer rows than the Hopper kernel takes
    "prefill": Call(launch_tiled, 512, 2),
    "verify of few keys": Call(launch_split_k, 8, 8, 200),
    "verify of many keys": Call(launch_split_k, 15, 8, 200_000),
}
NAMES = tuple(name for name in CALLS if not name.endswith(" keys"))
LATENT = 576  # keys of two tiles; values are narrower
RAGGED = (80, 96, 160, 192, 320)  # head dims that are no power of two
CASES = [
    *itertools.product(ARCHES, HEAD_DIMS, NAMES, ["positions"]),
    *itertools.product(ARCHES, HEAD_DIMS, ["decode", "verify 16", "prefill"], ["tensor"]),
    *itertools.product(["sm_90"], RAGGED, ["prefill", "verify 5"], ["positions"]),
    *itertools.product(["sm_90"], (64, 128, *RAGGED), ["verify of few keys"], ["positions"]),
    ("sm_90", 64, "verify of many keys", "positions"),
    ("sm_90", 192, "verify of many keys", "positions"),
    *itertools.product(LIKE_SM_89, HEAD_DIMS[2:], ["decode", "verify 16", "prefill"], ["positions"]),
    *itertools.product([*ARCHES, *LIKE_SM_89], [LATENT], ["decode", "verify 5", "prefill"], ["positions"]),
]

FEW = (64, "a value or two, outside of the loop over full tiles")
ONE_READ = "the accumulator alone is 128 registers a thread; with half the rows every key would be read twice"
WIDE = "the accumulator alone is 128 registers a thread, and a tile that is partly masked needs its bounds as well"
SPLIT = "where partial results go is kept through the loops; with one split, as in most prefills, nothing spills"
FULL = "128 registers of accumulator and the operands of two products; any other division between its warps is slower"
# (kernel, D, call) -> allowed bytes of local memory per thread, and why; the larger value of Triton 3.6 and 3.7.
SPILLS = {
    ("_split_k_kernel", 128, "verify 16"): FEW,
    ("_split_k_kernel", 256, "verify 5"): FEW,
    ("_split_k_kernel", 256, "verify 16"): (640, ONE_READ),
    ("_split_k_kernel", 512, "decode"): FEW,
    ("_split_k_kernel", 512, "verify 5"): (384, ONE_READ),
    ("_split_k_kernel", 512, "verify 16"): (384, ONE_READ),
    ("_split_k_kernel", LATENT, "verify 5"): (320, ONE_READ),
    ("_tiled_kernel", 256, "prefill"): (400, WIDE),
    ("_tiled_kernel", 512, "prefill 33"): (160, WIDE),
    ("_tiled_kernel", 512, "prefill"): (320, WIDE),
    ("_tiled_kernel", LATENT, "prefill"): (240, WIDE),
    ("_hopper_kernel", 64, "prefill"): FEW,
    ("_hopper_kernel", 128, "prefill"): (100, SPLIT),
    ("_hopper_kernel", 160, "prefill"): (32, SPLIT),
    ("_hopper_kernel", 256, "prefill"): (16, SPLIT),
    ("_hopper_kernel", 512, "prefill"): FEW,
    ("_hopper_kernel", 320, "prefill"): FEW,
    ("_hopper_kernel", 320, "verify 5"): (176, FULL),
    ("_hopper_kernel", 320, "verify of few keys"): (176, FULL),
    ("_hopper_kernel", 512, "verify 5"): (176, FULL),
    ("_hopper_kernel", 512, "verify 16"): (176, FULL),
}


def masks(q_len: int, keys: int) -> dict[str, tuple[torch.Tensor | None, Intervals | None]]:
    """Masks as the passes hand them to kernels: bounds of key indices, and a tensor."""
    bounds = torch.zeros(2, 1, q_len, dtype=torch.int64)
    dense = torch.ones(1, 1, q_len, keys, dtype=torch.bool)
    return {"positions": (None, Intervals(bounds, None)), "tensor": (dense, None)}


def compiled(
    arch: str, head_dim: int, call: Call, mask: str, softcap: float = 0.0, sinks: bool = False
) -> list[Compiled]:
    heads = HEADS_KV * call.group
    query = torch.empty(1, call.q_len, heads, head_dim, dtype=torch.bfloat16).transpose(1, 2)
    key = torch.empty(1, HEADS_KV, call.keys, head_dim, dtype=torch.bfloat16)
    value = torch.empty(1, HEADS_KV, call.keys, min(head_dim, MAX_V_HEAD_DIM), dtype=torch.bfloat16)
    dense, intervals = masks(call.q_len, call.keys)[mask]
    with compiling_for(arch) as kernels:
        scores = {"softcap": softcap, "sinks": torch.empty(heads, dtype=torch.bfloat16) if sinks else None}
        call.launch(AttentionCall(query, key, value, 0.1, mask=dense, intervals=intervals, **scores))
    return kernels


@pytest.mark.parametrize(("arch", "head_dim", "name", "mask"), CASES)
def test_no_spills_but_those_listed_and_no_more_shared_memory_than_there_is(arch, head_dim, name, mask):
    kernels = compiled(arch, head_dim, CALLS[name], mask)
    assert sum(kernel.name in MAIN for kernel in kernels) == 1
    for kernel in kernels:
        assert kernel.shared_memory <= tuning.limits(arch).shared_memory_per_block
        found, (allowed, _) = 4 * kernel.spilled, SPILLS.get((kernel.name, head_dim, name), (0, ""))
        assert found <= allowed, f"{kernel.name} spills {found} bytes of a thread, {allowed} are known"


@pytest.mark.parametrize(("arch", "head_dim", "name"), [*itertools.product(("sm_80", "sm_90"), HEAD_DIMS, NAMES)])
def test_softcaps_and_sinks_spill_no_more(arch, head_dim, name):
    """Every arch has the split-K and tiled kernels for them, and these spill where they spill without either."""
    kernels = compiled(arch, head_dim, CALLS[name], "positions", softcap=50.0, sinks=True)
    (kernel,) = (kernel for kernel in kernels if kernel.name in MAIN)
    assert kernel.name != "_hopper_kernel"
    assert max(kernel.shared_memory for kernel in kernels) <= tuning.limits(arch).shared_memory_per_block
    assert 4 * kernel.spilled <= SPILLS.get((kernel.name, head_dim, name), (0, ""))[0]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", ["verify 16", "prefill"])
def test_hopper_stores_no_value_alone(head_dim, name):
    """Stores of 2 bytes, for which the compiler loses track of the addresses' alignment, cost 10 to 30%."""
    (kernel,) = (k for k in compiled("sm_90", head_dim, CALLS[name], "positions") if k.name in MAIN)
    stores = collections.Counter(re.findall(r"st\.global\.(?:L1::\S+\.)?(\S+)", kernel.ptx))
    if kernel.name != "_hopper_kernel":
        assert name == "verify 16"
        return
    assert not {width for width in stores if width.endswith("16") and not width.startswith("v")}
    # Partial results of splits are stored in 16 bytes, and so are results if there is room to exchange columns.
    # (Maxima, sums and units are a dozen stores.)
    assert stores["v4.b32"] > 0
    assert (stores["b32"] <= 16) == (name == "prefill" and head_dim in (64, 128, 256)), stores
