"""Programs in which a careless rewrite of quantized products would compute other numbers, or end in an exception."""

from __future__ import annotations

import io
import time

import pytest
import torch
import torch.nn.functional as F

from flashpte.passes import replace_linear

N = K = 128
X = torch.randn(4, K, generator=torch.Generator().manual_seed(3))


def codes(*shape, low=-128, high=128, dtype=torch.int8):
    return torch.randint(low, high, shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


def scales(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 0.01 + 0.005


class Module(torch.nn.Module):
    def __init__(self, compute, **buffers):
        super().__init__()
        self.compute = compute
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)

    def forward(self, x):
        return self.compute(self, x)


def quantized(program):
    return sum(node.target is torch.ops.flashpte.quantized_linear.default for node in program.graph.nodes)


def rewritten(module, **options):
    """The rewritten program and its report.

    The program is compared with the original, also after it was rewritten again, decomposed twice, and stored.
    """
    program = torch.export.export(module, (X,), **options)
    expected = program.module()(X)
    new, report = replace_linear(program, fuse=False)
    again, _ = replace_linear(new, fuse=False)
    stored = io.BytesIO()
    torch.export.save(new, stored)
    stored.seek(0)
    twice = new.run_decompositions({}).run_decompositions({})
    for each in (new, again, torch.export.load(stored), twice):
        assert (each.module()(X) - expected).norm() <= 2**-7 * expected.norm()
    assert quantized(again) == quantized(new)
    return new, report


def linear(weight="a", scale="s"):
    return lambda m, x: F.linear(x, getattr(m, weight) * getattr(m, scale))


def repeated(value, function, times):
    for _ in range(times):
        value = function(value)
    return value


A, B, S, T = codes(N, K), codes(N, K).flip(0), scales(N, 1), -scales(N, 1, seed=1)

REPLACED = {
    "parts of a stack": (
        lambda m, x: sum(F.linear(x, m.a[i] * m.s[i]) for i in range(3)),
        {"a": codes(3, N, K), "s": scales(3, N, 1)},
        3,
    ),
    "parts of a fused weight": (
        lambda m, x: torch.cat((F.linear(x, (m.a * m.s)[:96]), F.linear(x, (m.a * m.s)[96:])), -1),
        {"a": A, "s": S},
        2,
    ),
    "the same codes with two scales": (
        lambda m, x: F.linear(x, m.a * m.s) + F.linear(x, m.a * m.t),
        {"a": A, "s": S, "t": T},
        2,
    ),
    "two codes with the same scale, written first": (
        lambda m, x: F.linear(x, m.s * m.a) + F.linear(x, m.s * m.b),
        {"a": A, "b": B, "s": S},
        2,
    ),
    "one after the other": (
        lambda m, x: F.linear(F.linear(x, m.a * m.s), m.b * m.s),
        {"a": A, "b": B, "s": S},
        2,
    ),
    "there and back": (lambda m, x: (x @ (m.a * m.s).t()) @ (m.a * m.s), {"a": A, "s": scales(1)}, 2),
    "a name that is taken": (linear("weight", "weight_scales"), {"weight": A, "weight_scales": S}, 1),
    "scales of other strides": (
        lambda m, x: F.linear(x, (m.a.view(N, 2, 64) * m.s.t()[..., None]).view(N, K)),
        {"a": A, "s": scales(2, N)},
        1,
    ),
    "scales in 8 bits": (
        lambda m, x: F.linear(x, (m.a.view(N, 2, 64) * (m.q * m.s)[..., None]).view(N, K)),
        {"a": A, "q": codes(N, 2, low=1), "s": S},
        1,
    ),
    "zero points in 8 bits": (
        lambda m, x: F.linear(x, (m.a.float() - m.z.float()) * m.s),
        {"a": codes(N, K, low=0, high=256, dtype=torch.uint8), "z": codes(N, 1, low=100, dtype=torch.uint8), "s": S},
        1,
    ),
    "a long chain": (
        lambda m, x: F.linear(x, repeated(m.a * m.s, lambda w: w * 1.001, 400)),
        {"a": A, "s": S},
        1,
    ),
}


@pytest.mark.parametrize("name", REPLACED)
def test_replaced(name):
    compute, buffers, products = REPLACED[name]
    new, report = rewritten(Module(compute, **buffers))
    assert quantized(new) == products
    assert all(outcome.applied for outcome in report.outcomes)


def test_the_old_weight_goes_and_what_nothing_ever_used_stays():
    module = Module(lambda m, x: F.linear(x, m.a.float() * m.s), a=A, s=S, extra=torch.ones(3))
    new, _ = rewritten(module)
    assert set(new.state_dict) == {"a_packed", "a_scales", "extra"}


def test_codes_of_gptq_are_4_bits():
    """Eight nibbles in an int32 word, along K, and zero points that are subtracted as integers."""

    def compute(m, x):
        q = (m.a[:, None, :] >> m.shifts[None, :, None] & 15).reshape(K, N)
        z = (m.z[:, :, None] >> m.shifts & 15).reshape(1, N)
        return x @ ((q - z).float() * m.s)

    words = codes(K // 8, N, low=-(2**31), high=2**31, dtype=torch.int32)
    zeros = codes(1, N // 8, low=-(2**31), high=2**31, dtype=torch.int32)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    _, report = rewritten(Module(compute, a=words, z=zeros, shifts=shifts, s=scales(1, N)))
    assert [outcome.decision.reason for outcome in report.outcomes] == [
        "4-bit weight [128, 128], with zero points, a scale per 128 columns"
    ]


def test_nibbles_unpacked_in_place_stay():
    def compute(m, x):
        weight = torch.zeros_like(m.p).repeat(1, 2)
        weight[:, ::2] = m.p & 15
        weight[:, 1::2] = m.p >> 4
        return F.linear(x, (weight.float() - 8) * m.s)

    new, report = rewritten(Module(compute, p=codes(N, K // 2, low=0, high=256, dtype=torch.uint8), s=S))
    assert quantized(new) == 0
    assert not any(outcome.applied for outcome in report.outcomes)


def test_a_buffer_in_memory_that_another_buffer_writes_stays():
    weight = codes(N, K)

    def compute(m, x):
        out = F.linear(x, m.a * m.s)
        m.v.add_(1)
        return out

    program = torch.export.export(Module(compute, a=weight, v=weight.view(-1), s=S), (X,))
    assert quantized(replace_linear(program, fuse=False)[0]) == 0


def test_a_preserved_module_keeps_its_output():
    model = torch.nn.Sequential(Module(linear(), a=A, s=S), torch.nn.Tanh())
    new, _ = rewritten(model, preserve_module_call_signature=("0",))
    assert quantized(new) == 1
    torch.testing.assert_close(torch.export.unflatten(new)(X), model(X), rtol=1e-2, atol=1e-2)


BIASES = {"of one number": scales(1), "with gaps": scales(2 * N)}


@pytest.mark.parametrize("name", BIASES)
def test_a_bias_that_the_kernel_does_not_take(name):
    def compute(m, x):
        return F.linear(x, m.a * m.s, m.b if m.b.numel() == 1 else m.b[::2])

    new, report = rewritten(Module(compute, a=A, s=S, b=BIASES[name]))
    assert quantized(new) == 0
    assert report.outcomes[0].decision.reason == "the bias is not a contiguous tensor of 128 numbers"


def test_odd_names():
    class Named(torch.nn.Module):
        def __init__(self):
            super().__init__()
            names = ("a-b", "a", "a_b")
            self.layers = torch.nn.ModuleDict(
                {name: Module(linear(), a=A.roll(shift, 0), s=S) for shift, name in enumerate(names)}
            )

        def forward(self, b_layers_a_a_packed):
            return sum(layer(b_layers_a_a_packed) for layer in self.layers.values())

    new, _ = rewritten(Named())
    assert quantized(new) == 3


def test_vmap_and_numbers():
    def compute(m, x):
        once = torch.vmap(lambda rows: F.linear(rows, m.a * m.s))(x[None])[0]
        return once + F.linear(x, m.a.float() * m.t.item())

    program = torch.export.export(Module(compute, a=A, s=S, t=torch.tensor(0.01)), (X,))
    new, report = replace_linear(program, fuse=False)
    for outcome in report.outcomes:
        assert outcome.applied or outcome.decision.reason in (
            "it is inside torch.vmap",
            "its codes, scale or zero point are not known when the program is compiled",
        )
    torch.testing.assert_close(new.module()(X), program.module()(X), rtol=1e-2, atol=1e-2)


def test_a_matrix_of_positions():
    rewritten(Module(lambda m, x: x @ torch.arange(K).float()[:, None]))


def test_a_graph_of_many_paths_takes_no_time():
    program = torch.export.export(Module(lambda m, x: x.t() @ repeated(x, lambda y: y + y * y, 30)), (X / 100,))
    start = time.monotonic()
    _, report = replace_linear(program, fuse=False)
    assert report.outcomes == ()
    assert time.monotonic() - start < 20


COARSE = {
    "rounded sums": lambda m, x: F.linear(x, ((m.a * m.s).bfloat16() + m.o - m.o).float()),
    "float8": lambda m, x: F.linear(x, (m.a * m.s).to(torch.float8_e4m3fn).float()),
}


@pytest.mark.parametrize("name", COARSE)
def test_a_rounding_that_is_coarser_than_the_kernel(name):
    offset = torch.tensor(40.0).bfloat16()
    new, report = rewritten(Module(COARSE[name], a=codes(N, K, low=-1, high=2), s=torch.full((N, 1), 1.12), o=offset))
    assert quantized(new) == 0
    assert len(report.outcomes) == 1
