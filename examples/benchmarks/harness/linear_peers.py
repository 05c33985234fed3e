"""Who multiplies by packed weights beside flashpte: each packs the same codes and scales for itself.

A peer takes a :class:`Problem` and returns a function that packs one more copy of the weight and gives back the call.
Where it is missing or refuses, it raises, and that is the result.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable

import torch

from flashpte.kernels import quantized_linear
from flashpte.kernels.linear.format import Groupwise, PackedFormat, pack
from harness.results import OURS

VLLM_VARIABLE = "FLASHPTE_BENCH_VLLM"

Call = Callable[[], torch.Tensor]
U4B8 = 1125899907892224
"""vLLM's number for unsigned 4 bits with a bias of 8."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """One product on the GPU.

    Attributes:
        x: bfloat16 ``[M, K]``.
        codes: uint8 ``[N, K]``, from 0 to 15, with 8 for zero if there are no offsets.
        scales: ``[N, K / group]``, bfloat16 if there are no offsets.
        group: columns that share a scale.
        offsets: like ``scales``, or ``None``. Peers but cuBLAS refuse them.
        bits: of a stored code; 8 with offsets alone.
    """

    x: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    group: int
    offsets: torch.Tensor | None = None
    bits: int = 4

    @property
    def dense(self) -> torch.Tensor:
        """The weight, float32 ``[N, K]``."""
        n, k = self.codes.shape
        grouped = self.codes.view(n, -1, self.group).float()
        if self.offsets is None:
            return ((grouped - 8) * self.scales.float()[..., None]).view(n, k)
        return (grouped * self.scales.float()[..., None] + self.offsets.float()[..., None]).view(n, k)

    @property
    def symmetric(self) -> Problem:
        """The same problem, for peers that take symmetric codes of 4 bits alone."""
        if self.offsets is not None:
            raise ValueError("for symmetric codes")
        return self


def flashpte(problem: Problem) -> Callable[[], Call]:
    """The operator, launched from Python: in a lowered program weights are also read before the kernel before ends."""
    n, k = problem.codes.shape
    numbers = (problem.bits, problem.group, n, k)
    moved = problem.offsets is not None
    fmt = PackedFormat(*numbers, scale_dtype=problem.scales.dtype, has_offsets=moved)
    packed = pack(Groupwise(problem.codes, problem.scales, None, problem.offsets), fmt)

    def copy() -> Call:
        weight, scales = packed.weight.clone(), packed.scales.clone()
        offsets = None if packed.offsets is None else packed.offsets.clone()
        return lambda: quantized_linear(problem.x, weight, scales, None, offsets, None, *numbers)

    return copy


def cublas(problem: Problem) -> Callable[[], Call]:
    """The product of cuBLAS, with the weight in bfloat16."""
    dense = problem.dense.bfloat16()

    def copy() -> Call:
        weight = dense.clone()
        return lambda: torch.nn.functional.linear(problem.x, weight)

    return copy


def tinygemm(problem: Problem) -> Callable[[], Call]:
    """PyTorch's own kernel."""
    if len(problem.x) > 16:
        raise ValueError("for few rows")
    codes = problem.symmetric.codes
    packed = torch.ops.aten._convert_weight_to_int4pack(((codes[:, ::2] << 4) | codes[:, 1::2]).contiguous(), 8)
    groups = torch.stack([problem.scales.t(), torch.zeros_like(problem.scales.t())], -1).contiguous()

    def copy() -> Call:
        weight, numbers = packed.clone(), groups.clone()
        return lambda: torch.ops.aten._weight_int4pack_mm(problem.x, weight, problem.group, numbers)

    return copy


@functools.cache
def _vllm():
    path = os.environ.get(VLLM_VARIABLE)
    if not path:
        raise ImportError("no library given (--vllm)")
    torch.ops.load_library(path)
    return torch.ops._C


def _by_eight(codes: torch.Tensor) -> torch.Tensor:
    """Codes ``[N, K]`` as GPTQ packs them: int32 ``[K / 8, N]``."""
    n, k = codes.shape
    columns = codes.t().reshape(k // 8, 8, n).int()
    # Views of a transposed tensor: their sum has its strides.
    return sum((columns[:, i] << (4 * i) for i in range(1, 8)), columns[:, 0]).contiguous()


def marlin(problem: Problem) -> Callable[[], Call]:
    """Marlin as vLLM builds it."""
    library, (n, k), m = _vllm(), problem.symmetric.codes.shape, len(problem.x)
    none = torch.empty(0, dtype=torch.int32, device="cuda")
    space = torch.zeros(4 * torch.cuda.get_device_properties(0).multi_processor_count, dtype=torch.int32, device="cuda")
    packed = library.gptq_marlin_repack(_by_eight(problem.codes), none, k, n, 4, False)
    order = [i + 8 * j for i in range(8) for j in range(8)]
    scales = problem.scales.t().contiguous().reshape(-1, 64)[:, order].reshape(-1, n).contiguous()

    def copy() -> Call:
        w, s = packed.clone(), scales.clone()
        rest = (None, None, None, none, none, space, U4B8, m, n, k, True, False, True, False)
        return lambda: library.marlin_gemm(problem.x, None, w, None, s, *rest)

    return copy


def machete(problem: Problem) -> Callable[[], Call]:
    """Machete as vLLM builds it, for groups of 64 columns or more."""
    library = _vllm()
    columns = _by_eight(problem.symmetric.codes).t().contiguous().t()
    packed = library.machete_prepack_B(columns, torch.bfloat16, U4B8, torch.bfloat16)
    scales = problem.scales.t().contiguous()

    def copy() -> Call:
        w, s = packed.clone(memory_format=torch.preserve_format), scales.clone()
        return lambda: library.machete_mm(problem.x, w, U4B8, None, s, None, problem.group, None, None, None)

    return copy


def humming(problem: Problem) -> Callable[[], Call]:
    """Humming, which compiles for a shape and quantizes for itself."""
    from humming.layer import HummingLayer

    n, k = problem.symmetric.codes.shape
    weight_config = {"dtype": "int4", "group_size": problem.group}
    dense = problem.dense.bfloat16()

    def copy() -> Call:
        layer = HummingLayer(shape_n=n, shape_k=k, weight_config=weight_config, torch_dtype=torch.bfloat16).cuda()
        layer.load_from_unquantized(dense)
        layer.transform()
        return lambda: layer(problem.x)

    return copy


RUNNERS: dict[str, Callable[[Problem], Callable[[], Call]]] = {
    OURS: flashpte,
    "humming": humming,
    "marlin": marlin,
    "machete": machete,
    "tinygemm": tinygemm,
    "cublas bf16": cublas,
}
LARGEST_ERROR = {"humming": 0.25}
"""Of a result against float32, where it is not 0.01: Humming rounds the weight to codes of its own."""
