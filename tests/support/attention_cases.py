"""Attention problems for tests and benchmarks: inputs, masks, the float64 answer and the allowed error."""

from __future__ import annotations

import dataclasses
import math

import torch

from flashpte.kernels import attention_reference
from flashpte.kernels.call import AttentionCall
from flashpte.kernels.intervals import Intervals

MASKS = (
    "none",
    "is_causal",
    "bool_dense",
    "bool_context",
    "bool_window",
    "bool_ring",
    "bool_padding",
    "bool_batch",
    "bool_head",
    "bool_single",
    "bool_empty_rows",
    "bool_all_empty",
    "float_bias",
    "float_inf_context",
    "float_min_context",
    "float_min_rows",
    "float_all_min",
    "float_row_bias",
)
INTERVAL_MASKS = (
    "causal",
    "window",
    "ring",
    "permuted",
    "gapped",
    "documents",
    "padding",
    "batch",
    "empty",
    "extremes",
)
LAYOUTS = ("contiguous", "blhd", "sliced", "expanded")


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention problem; ``layout`` is the memory layout of keys and values (see :func:`keys_in`).

    ``sinks`` is the dtype of the sinks, ``None`` for none.
    """

    q_len: int
    kv_len: int
    batch: int = 1
    heads_q: int = 4
    heads_kv: int = 2
    head_dim: int = 64
    v_head_dim: int | None = None
    dtype: torch.dtype = torch.float16
    mask: str = "none"
    layout: str = "contiguous"
    scale: float | None = None
    dim_order: tuple[int, ...] = (0, 2, 1, 3)
    seed: int = 0
    softcap: float = 0.0
    sinks: torch.dtype | None = None

    def __str__(self) -> str:
        dv = f"v{self.v_head_dim}" if self.v_head_dim else ""
        return (
            f"B{self.batch}-H{self.heads_q}x{self.heads_kv}-M{self.q_len}-L{self.kv_len}-D{self.head_dim}{dv}"
            f"-{str(self.dtype)[6:]}-{self.mask}-{self.layout}"
            f"{f'-cap{self.softcap}' if self.softcap else ''}{f'-sinks_{str(self.sinks)[6:]}' if self.sinks else ''}"
        )


@dataclasses.dataclass(frozen=True)
class Problem:
    """Tensors of a case: ``query, key, value``, a 4-dimensional mask or ``None``, and the call's other arguments."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    is_causal: bool
    scale: float
    softcap: float = 0.0
    sinks: torch.Tensor | None = None

    def call(
        self, dim_order: tuple[int, ...] = (0, 2, 1, 3), intervals: Intervals | None = None, **changes
    ) -> AttentionCall:
        """The problem as launchers take it; given intervals replace the mask."""
        mask = self.mask if intervals is None else None
        causal = self.is_causal and intervals is None
        masked = (self.query, self.key, self.value, self.scale, causal, dim_order, mask, intervals)
        return dataclasses.replace(AttentionCall(*masked, self.softcap, self.sinks), **changes)


def positions(case: Case) -> torch.Tensor:
    """Positions int64 ``[L_q]`` of the query rows, at the end of a context that fills most of the buffer."""
    context = max(case.q_len, min(case.kv_len, case.kv_len - case.kv_len // 5))
    return torch.arange(case.q_len) + context - case.q_len


def make_mask(case: Case, generator: torch.Generator) -> torch.Tensor | None:
    """The case's mask on the CPU, ``[Bm, Hm, L_q or 1, L_kv or 1]``."""
    q_len, kv_len, minimum = case.q_len, case.kv_len, torch.finfo(case.dtype).min
    pos, keys = positions(case)[:, None], torch.arange(kv_len)[None]
    context = (keys <= pos)[None, None]
    window = max(1, kv_len // 4)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(case.dtype)

    match case.mask:
        case "none" | "is_causal":
            return None
        case "bool_dense":
            return rand(1, 1, q_len, kv_len) < 0.4
        case "bool_context":
            return context
        case "bool_window":
            return context & (keys > pos - window)
        case "bool_ring":
            # A ring of kv_len slots after it wrapped: live keys at both ends, dead keys between them.
            slot_pos = keys + torch.div(pos.max() + kv_len // 3 - keys, kv_len, rounding_mode="floor") * kv_len
            distance = pos + kv_len // 3 - slot_pos
            return ((slot_pos >= 0) & (distance >= 0) & (distance < max(1, kv_len // 2)))[None, None]
        case "bool_padding":
            return (keys < max(1, kv_len // 2))[None, None]
        case "bool_batch":
            return rand(case.batch, 1, q_len, kv_len) < 0.3
        case "bool_head":
            mask = rand(case.batch, case.heads_q, q_len, kv_len) < 0.1
            mask[:, 0] = False
            return mask
        case "bool_single":
            return torch.ones(1, 1, 1, 1, dtype=torch.bool)
        case "bool_empty_rows":
            mask = rand(1, 1, q_len, kv_len) < 0.5
            mask[:, :, ::2] = False
            return mask
        case "bool_all_empty":
            return torch.zeros(1, 1, q_len, kv_len, dtype=torch.bool)
        case "float_bias":
            return noise(1, case.heads_q, q_len, kv_len)
        case "float_row_bias":
            return noise(case.batch, case.heads_q, 1, kv_len)
        case "float_inf_context":
            return torch.zeros(1, 1, q_len, kv_len, dtype=case.dtype).masked_fill(~context, float("-inf"))
        case "float_min_context":
            return torch.zeros(1, 1, q_len, kv_len, dtype=case.dtype).masked_fill(~context, minimum)
        case "float_all_min":
            return torch.full((1, 1, q_len, kv_len), minimum, dtype=case.dtype)
        case "float_min_rows":
            # Even rows hold only the dtype's minimum, which is finite: their result is the mean of the values.
            mask = noise(1, 1, q_len, kv_len)
            mask[:, :, ::2] = minimum
            return mask
    raise ValueError(case.mask)


def make_intervals(kind: str, case: Case) -> Intervals:
    """A mask given as intervals over a case's keys; :meth:`Intervals.dense` defines it."""
    generator = torch.Generator().manual_seed(case.seed)
    q_len, kv_len = case.q_len, case.kv_len
    pos, keys = positions(case), torch.arange(kv_len)
    none, all_ = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    window = max(1, kv_len // 4)

    def bounds(*terms: tuple) -> torch.Tensor:
        """``[2 T, B, L_q]`` from pairs of lower and upper bounds ``[B, L_q]``, ``[L_q]`` or one number."""
        rows = [torch.as_tensor(side, dtype=torch.int64).expand(1, q_len) for term in terms for side in term]
        return torch.stack(rows)

    match kind:
        case "causal":
            return Intervals(bounds((none, pos)), None)
        case "window":
            return Intervals(bounds((pos - window + 1, pos)), None)
        case "ring":
            last = pos.max() + kv_len // 3
            held = last - torch.remainder(last - keys, kv_len)
            lower = (pos + kv_len // 3 - kv_len // 2 + 1).clamp(min=0)
            return Intervals(bounds((lower, pos + kv_len // 3)), held[None, None].contiguous())
        case "permuted":
            order = torch.randperm(kv_len, generator=generator)
            rows = torch.randint(kv_len, (q_len,), generator=generator)
            return Intervals(bounds((rows - window, rows)), order[None, None].contiguous())
        case "gapped":
            rows = torch.randint(4 * kv_len, (q_len,), generator=generator) - kv_len
            return Intervals(bounds((rows - 2 * window, rows)), (keys * 3)[None, None].contiguous())
        case "documents":
            key_documents = torch.div(keys, max(1, kv_len // 5), rounding_mode="floor")
            documents = torch.div(pos, max(1, kv_len // 5), rounding_mode="floor")
            return Intervals(bounds((none, pos), (documents, documents)), key_documents[None, None].contiguous())
        case "padding":
            valid = (keys < max(1, kv_len // 2)) | (keys % 7 == 0)
            return Intervals(bounds((none, pos), (1, all_)), valid.long()[None, None].contiguous())
        case "batch":
            lengths = torch.randint(kv_len, (case.batch,), generator=generator)
            rows = torch.zeros(2, case.batch, q_len, dtype=torch.int64)
            rows[1] = torch.minimum(lengths[:, None] + torch.arange(q_len), torch.tensor(kv_len - 1))
            shift = torch.randint(3, (1, case.batch, 1), generator=generator)
            return Intervals(rows, keys[None, None] + shift)
        case "empty":
            return Intervals(bounds((pos + 1, pos)), None)
        case "extremes":
            values = torch.where(keys % 2 == 0, none, all_)
            values[keys % 3 == 0] = 5
            return Intervals(bounds((none, 5 + pos % 2)), values[None, None].contiguous())
    raise ValueError(kind)


def with_intervals(case: Case, kind: str, device: str = "cpu") -> tuple[Problem, Intervals]:
    """A case whose mask is given as intervals; the problem holds the same mask as a dense tensor."""
    problem, intervals = build(case, device), make_intervals(kind, case)
    moved = Intervals(intervals.bounds.to(device), None if intervals.values is None else intervals.values.to(device))
    return dataclasses.replace(problem, mask=moved.dense(case.kv_len)), moved


def keys_in(layout: str, batch: int, heads: int, length: int, dim: int, dtype, generator) -> torch.Tensor:
    """Random ``[B, H_kv, L, D]`` with the named memory layout; memory around a view holds NaN.

    ``blhd`` is a transposed ``[B, L, H, D]`` cache, ``sliced`` the live part of a larger buffer, and ``expanded`` one
    batch entry repeated with stride 0.
    """
    data = torch.randn(batch, heads, length, dim, generator=generator).to(dtype)
    if layout == "blhd":
        return data.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":
        buffer = torch.full((batch, heads + 1, length + 9, dim + 8), float("nan"), dtype=dtype)
        view = buffer[:, 1:, 4 : 4 + length, :dim]
        view.copy_(data)
        return view
    if layout == "expanded":
        return data[:1].expand(batch, -1, -1, -1)
    return data


def _to(tensor: torch.Tensor | None, device: str) -> torch.Tensor | None:
    """Moves a view to ``device`` with its strides and the memory around it."""
    if tensor is None or device == "cpu":
        return tensor
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).to(device)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def build(case: Case, device: str = "cpu") -> Problem:
    """Makes a case's tensors; the same seed gives the same tensors on every device."""
    generator = torch.Generator().manual_seed(case.seed)
    dim, v_dim = case.head_dim, case.v_head_dim or case.head_dim
    query = torch.randn(case.batch, case.q_len, case.heads_q, dim, generator=generator).to(case.dtype).transpose(1, 2)
    key = keys_in(case.layout, case.batch, case.heads_kv, case.kv_len, dim, case.dtype, generator)
    value = keys_in(case.layout, case.batch, case.heads_kv, case.kv_len, v_dim, case.dtype, generator)
    mask = make_mask(case, generator)
    # Some sinks are below every score, some among them and some above.
    sinks = None if case.sinks is None else 4 * torch.randn(case.heads_q, generator=generator).to(case.sinks)
    return Problem(
        _to(query, device),
        _to(key, device),
        _to(value, device),
        _to(mask, device),
        case.mask == "is_causal",
        case.scale if case.scale is not None else dim**-0.5,
        case.softcap,
        _to(sinks, device),
    )


def exact(problem: Problem) -> torch.Tensor:
    """The float64 answer ``[B, H_q, L_q, D_v]``."""
    p = problem
    query = p.query.double()
    mask = p.mask if p.mask is None or p.mask.dtype == torch.bool else p.mask.double()
    sinks = None if p.sinks is None else p.sinks.double()
    return attention_reference(query, p.key, p.value, mask, p.is_causal, p.scale, torch.float64, p.softcap, sinks)


def written_out(problem: Problem, dims: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Attention in float32 with every sum written out: one accumulator, one term after the other, in a given order.

    It uses no matrix product, so the result is the same on every processor: float32 additions, multiplications and
    divisions are exactly rounded everywhere; only a BLAS adds in an order of its own.

    Args:
        problem: the problem.
        dims: int64 ``[D]``, the order in which to sum head dims.
        keys: int64 ``[L_kv]``, the order in which to sum keys.

    Returns:
        float32 ``[B, H_q, L_q, D_v]``.
    """
    p = problem
    group = p.query.shape[1] // p.key.shape[1]
    query, key, value = p.query.float(), p.key.float(), p.value.float()
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query.new_zeros(*query.shape[:3], key.shape[2])
    for d in dims.tolist():
        scores += query[..., d, None] * key[..., None, :, d]
    scores *= p.scale
    if p.softcap:
        scores = torch.tanh(scores / p.softcap) * p.softcap
    if p.is_causal:
        scores.masked_fill_(scores.new_ones(scores.shape[-2:]).tril() == 0, -math.inf)
    elif p.mask is not None:
        scores = scores.masked_fill(~p.mask, -math.inf) if p.mask.dtype == torch.bool else scores + p.mask.float()
    sinks = None if p.sinks is None else p.sinks.float()[:, None, None].expand(*scores.shape[:3], 1)
    largest = (scores if sinks is None else torch.cat((scores, sinks), -1)).amax(-1, keepdim=True)
    weights = torch.exp(scores - largest.masked_fill(largest == -math.inf, 0.0))
    total = weights.new_zeros(weights.shape[:3])
    for n in keys.tolist():
        total += weights[..., n]
    if sinks is not None:
        total += torch.exp(sinks - largest.masked_fill(largest == -math.inf, 0.0))[..., 0]
    weights /= total.masked_fill(total == 0, 1.0)[..., None]
    out = weights.new_zeros(*weights.shape[:3], value.shape[3])
    for n in keys.tolist():
        out += weights[..., n, None] * value[:, :, None, n]
    return out


def plain_error(problem: Problem, answer: torch.Tensor) -> float:
    """The largest error of :func:`written_out` over four orders: forwards, backwards and two random ones."""
    generator = torch.Generator().manual_seed(0)

    def orders(count: int) -> list[torch.Tensor]:
        forwards = torch.arange(count)
        return [forwards, forwards.flip(0), *(torch.randperm(count, generator=generator) for _ in range(2))]

    both = zip(orders(problem.key.shape[3]), orders(problem.key.shape[2]), strict=True)
    plain = (written_out(problem, dims, keys).to(problem.query.dtype) for dims, keys in both)
    return max((out.double() - answer).abs().max().item() for out in plain)


def two_ulp(problem: Problem, answer: torch.Tensor) -> float:
    """2 ulp of the output dtype at the largest value."""
    largest = answer.abs().max().item()
    return 2 * torch.finfo(problem.query.dtype).eps * 2.0 ** math.floor(math.log2(largest)) if largest > 0 else 0.0


def check(problem: Problem, out: torch.Tensor) -> float:
    """Asserts that ``out`` is close enough to the float64 answer; returns error over bound.

    The bound is 2 ulp of the output dtype at the largest value, or twice :func:`plain_error` if that is more. PyTorch's
    math backend is no yardstick, because it is a BLAS: its accuracy depends on how many partial sums the processor's
    instructions keep, and its largest error in a few rows is a matter of luck. One correct program had 1.6 times twice
    the math backend's error under AVX-512, and less than twice that error under AVX2.
    """
    answer = exact(problem)
    assert out.dtype == problem.query.dtype
    assert out.shape == answer.shape
    assert not out.isnan().any(), "NaN in the result: an element was not written, or masked memory was used"
    error, bound = (out.double() - answer).abs().max().item(), two_ulp(problem, answer)
    if error > bound:
        bound = max(bound, 2 * plain_error(problem, answer))
    assert error <= bound, f"max error {error:.3e} is above the bound {bound:.3e}"
    return error / bound if bound else 0.0
