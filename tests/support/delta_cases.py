"""Problems of the gated delta rule for tests and benchmarks: inputs, the float64 answer and the allowed error."""

from __future__ import annotations

import dataclasses
import inspect
import math

import torch

from flashpte.kernels.delta.call import DeltaCall
from flashpte.kernels.delta.reference import delta_reference

KEYS = ("random", "alike", "same")


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem.

    Attributes:
        decay: the mean of -g. Qwen3-Next's decays range from almost none to forgetting within a token.
        keys: ``random``; ``alike``, whose directions differ little, so that corrections depend on each other; or all
            the ``same``.
        layout: ``split`` views of one tensor with NaN around them, as models have them, or ``contiguous``.
    """

    length: int
    batch: int = 1
    heads_k: int = 1
    heads: int = 2
    k_dim: int = 32
    v_dim: int = 32
    dtype: torch.dtype = torch.float16
    decay: float = 0.3
    keys: str = "random"
    layout: str = "split"
    state: bool = True
    l2norm: bool = True
    seed: int = 0

    def __str__(self) -> str:
        flags = "".join(f"-{name}" for name in ("state", "l2norm") if getattr(self, name))
        return (
            f"B{self.batch}-L{self.length}-H{self.heads_k}x{self.heads}-D{self.k_dim}x{self.v_dim}"
            f"-{str(self.dtype)[6:]}-{self.keys}-g{self.decay}-{self.layout}{flags}"
        )


def build(case: Case, device: str = "cpu") -> DeltaCall:
    """Makes a case's tensors; the same seed gives the same tensors on every device."""
    generator = torch.Generator().manual_seed(case.seed)

    def randn(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator)

    b, length, heads_k, heads = case.batch, case.length, case.heads_k, case.heads
    k_dim, v_dim = case.k_dim, case.v_dim
    key = randn(b, length, heads_k, k_dim)
    if case.keys != "random":
        key = randn(b, 1, heads_k, k_dim) + (0.1 if case.keys == "alike" else 0.0) * key
    query, value = randn(b, length, heads_k, k_dim), randn(b, length, heads, v_dim)
    if not case.l2norm:
        key, query = (torch.nn.functional.normalize(x, dim=-1) for x in (key, query))
    g = -case.decay * 2 * torch.rand(b, length, heads, generator=generator)
    beta = torch.rand(b, length, heads, generator=generator).to(case.dtype)
    tensors = [query, key, value]
    if case.layout == "split":
        widths = [heads_k * k_dim, heads_k * k_dim, heads * v_dim]
        mixed = torch.full((b, length + 2, sum(widths) + 8), float("nan"), dtype=case.dtype)
        mixed[:, 1:-1, : sum(widths)] = torch.cat([x.flatten(2).to(case.dtype) for x in tensors], -1)
        parts = mixed.to(device)[:, 1:-1, : sum(widths)].split(widths, -1)
        tensors = [part.unflatten(-1, x.shape[2:]) for part, x in zip(parts, tensors, strict=True)]
    else:
        tensors = [x.to(device, case.dtype) for x in tensors]
    state = randn(b, heads, k_dim, v_dim).to(device) if case.state else None
    return DeltaCall(*tensors, g.to(device), beta.to(device), state, k_dim**-0.5, case.l2norm)


def answers(call: DeltaCall, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """The answer in float64, or that of the plain formula in another dtype."""
    tensors = (call.query, call.key, call.value, call.g, call.beta, call.state)
    return delta_reference(*tensors, call.scale, call.l2norm, dtype)


def chunked_formula(call: DeltaCall) -> tuple[torch.Tensor, torch.Tensor]:
    """The answer of Hugging Face's chunked formula in float32, which is what an exported model computes."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    # The undecorated function: kernels from a hub may replace the decorated one.
    formula = inspect.unwrap(torch_chunk_gated_delta_rule)
    # Older releases leave repeating the heads to the caller.
    query, key = (x.float().repeat_interleave(call.heads // call.heads_k, 2) for x in (call.query, call.key))
    tensors = [query, key, call.value.float()]
    gates = {"g": call.g, "beta": call.beta.float()}
    return formula(
        *tensors,
        **gates,
        initial_state=call.state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=call.l2norm,
    )


def _ulp(dtype: torch.dtype, largest: float) -> float:
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(largest)) if largest > 0 else 0.0


def plain_errors(call: DeltaCall, exact: tuple[torch.Tensor, torch.Tensor], chunked: bool) -> list[float]:
    """The largest errors of the plain formula in float32, and with ``chunked`` of that one, over four orders of D_k."""
    generator = torch.Generator().manual_seed(0)
    forwards = torch.arange(call.k_dim)
    random = (torch.randperm(call.k_dim, generator=generator) for _ in range(2))
    largest = [0.0, 0.0]
    for order in (forwards, forwards.flip(0), *random):
        order = order.to(call.value.device)
        state = None if call.state is None else call.state[:, :, order]
        moved = dataclasses.replace(call, query=call.query[..., order], key=call.key[..., order], state=state)
        for formula in (answers, chunked_formula) if chunked else (answers,):
            out, held = formula(moved, torch.float32) if formula is answers else formula(moved)
            for i, (found, wanted) in enumerate(((out, exact[0]), (held, exact[1][:, :, order]))):
                largest[i] = max(largest[i], (found.double() - wanted).abs().max().item())
    return largest


def check(call: DeltaCall, results: tuple[torch.Tensor, torch.Tensor], chunked: bool) -> float:
    """Asserts that both results are close enough to the float64 answers; returns the larger error over its bound.

    The bound is 2 ulp at the largest value, or twice the largest of :func:`plain_errors` if that is more. An ulp is one
    of the result's dtype.

    The chunked kernels have the bounds of a chunked formula. Its decays are differences of running sums, so the error
    of :func:`chunked_formula` counts too. Corrections, which are as large as the values, are rounded twice to the dtype
    of the values before they are added to the state. So the bound of the state is 4 ulp of that dtype, and the
    largest value is one of the values or of the result.
    """
    worst = 0.0
    exact, plain = answers(call), None
    ulps = (2, call.value.dtype), ((4, call.value.dtype) if chunked else (2, torch.float32))
    for i, (found, wanted, (count, ulp_of)) in enumerate(zip(results, exact, ulps, strict=True)):
        name = ("result", "state")[i]
        assert found.dtype == (call.value.dtype, torch.float32)[i]
        assert found.shape == wanted.shape
        assert found.is_contiguous()
        if found.numel() == 0:
            continue
        assert not found.isnan().any(), f"NaN in the {name}: an element was not written, or masked memory was used"
        largest = wanted.abs().max().item()
        if chunked and call.value.numel():
            largest = max(largest, call.value.abs().max().item() * (call.scale if i == 0 else 1.0))
        error, bound = (found.double() - wanted).abs().max().item(), count * _ulp(ulp_of, largest)
        if error > bound:
            plain = plain_errors(call, exact, chunked) if plain is None else plain
            bound = max(bound, 2 * plain[i])
        assert error <= bound, f"max error of the {name} {error:.3e} is above the bound {bound:.3e}"
        worst = max(worst, error / bound if bound else 0.0)
    return worst
