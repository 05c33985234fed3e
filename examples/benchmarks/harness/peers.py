"""Peers that come with PyTorch, and ExecuTorch's operators.

Every peer gets what it runs best on: no mask where the context is the whole buffer and one row sees it all,
``is_causal`` where it means the same, the context's length where the buffer is longer, and masks converted beforehand.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F

from harness.cases import Case
from harness.inputs import Inputs
from harness.runner import Runner, Variant

aten = torch.ops.aten


def refuses_others(case: Case) -> str | None:
    """Our own times alone are compared in the suite of shapes outside the tables."""
    return "compared with our own tiles alone" if case.ours_alone else None


def up_to_256(case: Case) -> str | None:
    return refuses_others(case) or ("head dims up to 256" if case.shape.head_dim > 256 else None)


def _square(case: Case) -> bool:
    """Whether the causal flag, top left or bottom right, says all there is to say."""
    return case.rows == case.live and case.window is None


def _bias(inputs: Inputs) -> torch.Tensor | None:
    """The mask as PyTorch's backends take it, made once."""
    case = inputs.case
    if case.rows == 1 or _square(case):
        return None
    zeros = torch.zeros(inputs.live_mask.shape, device=inputs.mask.device, dtype=torch.bfloat16)
    return zeros.masked_fill_(~inputs.live_mask, float("-inf")).expand(case.batch, case.shape.heads_q, -1, -1)


def default(inputs: Inputs) -> dict[str, Variant]:
    """PyTorch's own choice of backend, called as a user would."""
    case = inputs.case
    causal = _square(case) and case.rows > 1
    mask = None if case.rows == 1 or causal else inputs.live_mask
    options = {"attn_mask": mask, "is_causal": causal, "scale": case.shape.scale, "enable_gqa": True}
    return {"": Variant([lambda s=s: F.scaled_dot_product_attention(*s, **options) for s in inputs.live_sets])}


def flash(inputs: Inputs) -> dict[str, Variant]:
    """FlashAttention 2 as PyTorch ships it; its causal flag is aligned to the bottom right and it has windows."""
    case = inputs.case
    lengths = (None, None, case.rows, case.live, 0.0, case.rows > 1, False)
    options: dict = {"scale": case.shape.scale}
    if case.window is not None:
        options |= {"window_size_left": case.window - 1, "window_size_right": 0}
    swapped = [tuple(t.transpose(1, 2) for t in s) for s in inputs.live_sets]
    calls = [lambda s=s: aten._flash_attention_forward(*s, *lengths, **options) for s in swapped]
    return {"": Variant(calls, lambda result: result[0].transpose(1, 2))}


def cudnn(inputs: Inputs) -> dict[str, Variant]:
    """CuDNN's attention."""
    case = inputs.case
    given = (_bias(inputs), False, 0.0, _square(case) and case.rows > 1, False)
    forward = functools.partial(aten._scaled_dot_product_cudnn_attention, scale=case.shape.scale)
    return {"": Variant([lambda s=s: forward(*s, *given) for s in inputs.live_sets], lambda result: result[0])}


def efficient(inputs: Inputs) -> dict[str, Variant]:
    """The memory-efficient backend; it has no grouped heads, so heads that share keys become a batch without a copy."""
    case, shape = inputs.case, inputs.case.shape
    folded = (case.batch * shape.heads_kv, shape.group)
    bias = _bias(inputs)
    if bias is not None:
        bias = bias[:1, :1].expand(*folded, -1, -1)
    given = (bias, False, 0.0, _square(case) and case.rows > 1)
    forward = functools.partial(aten._scaled_dot_product_efficient_attention, scale=shape.scale)

    def fold(s: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        q, k, v = s
        keys = [t.flatten(0, 1).unsqueeze(1).expand(*folded, -1, -1) for t in (k, v)]
        return [q.unflatten(1, (-1, shape.group)).flatten(0, 1), *keys]

    def unfold(result) -> torch.Tensor:
        return result[0].unflatten(0, (case.batch, -1)).flatten(1, 2)

    return {"": Variant([lambda s=s: forward(*s, *given) for s in map(fold, inputs.live_sets)], unfold)}


def _few_compiles(case: Case) -> str | None:
    few = case.suite == "verify" and case.rows != 8
    return up_to_256(case) or ("compiled for 8 rows alone" if few else None)


def flex(inputs: Inputs) -> dict[str, Variant]:
    """FlexAttention, compiled for the one shape, with the mask as a function of positions."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case = inputs.case
    torch._dynamo.reset()
    past, window = case.live - case.rows, case.window or case.live

    def visible(b, h, q, k):
        return (k <= q + past) & (q + past - k < window)

    block_mask = None
    if case.rows > 1:
        block_mask = create_block_mask(visible, None, None, case.rows, case.live, device=inputs.mask.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    options = {"block_mask": block_mask, "scale": case.shape.scale, "enable_gqa": True}
    return {"": Variant([lambda s=s: compiled(*s, **options) for s in inputs.live_sets])}


@functools.cache
def _executorch():
    # The package holds an operator of the module's name.
    return importlib.import_module("executorch.backends.cuda.triton.kernels.sdpa")


def _tuners() -> list:
    module = _executorch()
    names = ("_sdpa_fwd_kernel", "_sdpa_decode_splitk_kernel", "_sdpa_small_query_splitk_kernel")
    return [getattr(module, name) for name in names]


def _tune_briefly() -> None:
    """Its kernels tune themselves at the first call of a shape: measured less long than by default."""
    from triton.testing import do_bench

    for tuner in _tuners():
        tuner.do_bench = lambda call, quantiles: do_bench(call, warmup=2, rep=10, quantiles=quantiles)


def _compile_part(i: int, n: int) -> None:
    """Makes this process run every ``n``-th tile once instead of tuning."""

    def once(call: Callable[[], object], quantiles: object) -> list[float]:
        call()
        return [1.0] * 3

    for tuner in _tuners():
        everything = tuner.__dict__.setdefault("flashpte_bench_configs", tuner.configs)
        tuner.configs = everything[i::n]
        tuner.do_bench = once
        tuner.cache.clear()  # what was picked from another share


def executorch(inputs: Inputs, causal: bool = False) -> dict[str, Variant]:
    """ExecuTorch's operators for the number of rows, as its own pass picks them."""
    case, module = inputs.case, _executorch()
    if not any("do_bench" in tuner.__dict__ for tuner in _tuners()):
        _tune_briefly()
    op = module.sdpa
    if case.rows <= 4:
        op = module.sdpa_decode_splitk if case.rows == 1 else module.sdpa_small_query_splitk
    given = (None if causal else inputs.mask, 0.0, causal, case.shape.scale, True)
    return {"": Variant([lambda s=s: op(*s, *given) for s in inputs.sets])}


def _some_verify(case: Case) -> str | None:
    few = case.suite == "verify" and case.rows not in (4, 8)
    return refuses_others(case) or ("tunes itself; at 4 and 8 rows alone" if few else None)


def _square_causal(case: Case) -> str | None:
    return refuses_others(case) or (None if _square(case) and case.prefills else "needs a square causal mask")


RUNNERS = (
    Runner("torch default", refuses_others, default, parts=0),
    Runner("torch flash", up_to_256, flash, parts=0),
    Runner("torch cudnn", up_to_256, cudnn, parts=0),
    Runner("torch efficient", refuses_others, efficient, parts=0),
    Runner("flex", _few_compiles, flex),
    Runner("executorch", _some_verify, executorch, parts=3, part=_compile_part),
    Runner(
        "executorch causal", _square_causal, functools.partial(executorch, causal=True), parts=3, part=_compile_part
    ),
)
