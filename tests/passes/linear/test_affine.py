"""Codes, scales and zero points are read from any arithmetic, and the reading is compared with what it computes."""

from __future__ import annotations

import pytest
import torch
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_
from torchao.quantization.quant_primitives import MappingType

from flashpte.passes.graph.subclasses import unwrap_weights
from flashpte.passes.graph.weights import Weights
from flashpte.passes.linear.affine import NotQuantized, quantized_weight
from flashpte.passes.linear.find import find_product
from flashpte.passes.linear.known import Known

N, K = 48, 256


def read(module, columns=K):
    """What is read of the only product in a module, and its weight as the program computes it."""
    x = torch.randn(4, columns, dtype=torch.bfloat16)
    program = unwrap_weights(torch.export.export(module.eval(), (x,)))
    known = Known(program.graph, Weights(program).held)
    (product,) = filter(None, map(find_product, program.graph.nodes))
    assert known.is_known(product.weight)
    weight = known.value(product.weight)
    return quantized_weight(product.weight, product.transposed, known), weight.t() if product.transposed else weight


def dequantized(read):
    n, k = read.codes.shape
    zeros = 2 ** (read.bits - 1) if read.zeros is None else read.zeros[..., None]
    grouped = read.codes.view(n, k // read.group, read.group).float()
    return ((grouped - zeros) * read.scales[..., None]).view(n, k)


def torchao(config):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(K, N)).bfloat16()
    quantize_(module, config)
    return module


def intx(bits, granularity, mapping=MappingType.SYMMETRIC):
    dtype = {4: torch.int4, 8: torch.int8, 3: torch.int3}[bits]
    return IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity, mapping_type=mapping)


TORCHAO = {
    "int4 by 32": (lambda: intx(4, PerGroup(32)), (4, 32, False)),
    "int4 by 64 with zeros": (lambda: intx(4, PerGroup(64), MappingType.ASYMMETRIC), (4, 64, True)),
    "int4 by 128": (lambda: intx(4, PerGroup(128)), (4, 128, False)),
    "int4 by row": (lambda: intx(4, PerAxis(0)), (4, 128, False)),
    "int3 by 32": (lambda: intx(3, PerGroup(32)), (4, 32, False)),
    "int8 by row": (lambda: intx(8, PerAxis(0)), (8, K, False)),
    "int8 by 64": (lambda: intx(8, PerGroup(64)), (8, 64, False)),
    "int8, scaled behind the product": (Int8WeightOnlyConfig, (8, K, False)),
}


@pytest.mark.parametrize("name", TORCHAO)
def test_torchao(name):
    config, (bits, group, zeros) = TORCHAO[name]
    found, weight = read(torchao(config()))
    assert (found.bits, found.group, found.zeros is not None) == (bits, group, zeros)
    assert found.codes.shape == (N, K)
    assert int(found.codes.max()) < 2**bits
    torch.testing.assert_close(dequantized(found), weight.float(), rtol=2**-8, atol=0)


class Arithmetic(torch.nn.Module):
    """``linear`` with a weight that ``compute(codes, scales, zeros)`` makes from uint8 codes [N, K] of 4 bits."""

    def __init__(self, compute, store=lambda codes: codes, group=64, columns=K):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        codes = torch.randint(16, (N, columns), generator=generator, dtype=torch.uint8)
        codes[:, 0], codes[:, 1] = 0, 15  # all of the range
        self.register_buffer("codes", store(codes))
        scales = torch.rand(N, columns // group, generator=generator) + 0.5
        self.register_buffer("scales", scales.bfloat16())
        self.register_buffer("zeros", torch.randint(16, scales.shape, generator=generator).bfloat16())
        self.compute, self.group = compute, group

    def forward(self, x):
        weight = self.compute(self.codes, self.scales[..., None], self.zeros[..., None])
        return torch.nn.functional.linear(x, weight.reshape(N, -1))


def grouped(codes, group=64):
    return codes.view(N, -1, group).bfloat16()


def nibbles(codes):
    return codes[:, 0::2] | codes[:, 1::2] << 4


def unpacked(packed, high_first=False):
    halves = (packed & 15, packed >> 4)
    return torch.stack(halves[::-1] if high_first else halves, -1).reshape(N, -1)


FORMS = {
    "zero first": lambda q, s, z: (grouped(q) - z) * s,
    "scale first": lambda q, s, z: grouped(q) * s - z * s,
    "added minimum": lambda q, s, z: s * grouped(q) + -z * s,
    "reversed difference": lambda q, s, z: (z - grouped(q)) * -s,
    "divided": lambda q, s, z: (grouped(q) - z) / (1 / s),
    "in float32": lambda q, s, z: ((grouped(q).float() - z.float()) * s.float()).bfloat16(),
    "integer zeros": lambda q, s, z: (q.view(N, -1, 64).to(torch.int32) - z.to(torch.int32)).bfloat16() * s,
    "transposed twice": lambda q, s, z: ((grouped(q) - z) * s).reshape(N, -1).t().contiguous().t(),
}


@pytest.mark.parametrize("form", FORMS)
def test_arithmetic(form):
    found, weight = read(Arithmetic(FORMS[form]))
    assert (found.group, found.codes.shape) == (64, (N, K))
    # Some forms subtract rounded products, each up to 15 * 1.5.
    torch.testing.assert_close(dequantized(found), weight.float(), rtol=2**-7, atol=2**-8 * 15 * 1.5)


@pytest.mark.parametrize("high_first", [False, True])
def test_nibbles_in_either_order(high_first):
    """Codes are taken by value, so an order that merely looks like another is no other weight."""
    module = Arithmetic(lambda q, s, z: (grouped(unpacked(q, high_first)) - z) * s, nibbles)
    found, weight = read(module)
    expected = unpacked(module.codes, high_first)
    assert torch.equal(found.codes, expected)
    torch.testing.assert_close(dequantized(found), weight.float(), rtol=2**-7, atol=0)


def test_products_of_matrices():
    class Transposed(Arithmetic):
        def forward(self, x):
            weight = self.compute(self.codes, self.scales[..., None], self.zeros[..., None]).reshape(N, -1)
            return torch.addmm(torch.ones(N, dtype=x.dtype), x, weight.t())

    found, weight = read(Transposed(FORMS["zero first"]))
    assert found.codes.shape == (N, K)
    torch.testing.assert_close(dequantized(found), weight.float(), rtol=2**-7, atol=0)


TABLE = torch.linspace(-1, 1, 16, dtype=torch.bfloat16) ** 3

REFUSED = {
    "it is bfloat16, not quantized": torch.nn.Linear(K, N).bfloat16(),
    "it is computed by aten.index": Arithmetic(lambda q, s, z: TABLE[q.long()].view(N, -1, 64) * s),
    "it is computed by aten.pow": Arithmetic(lambda q, s, z: grouped(q) ** 2 * s),
    "aten.mul combines two tensors of [48, 4, 64]": Arithmetic(lambda q, s, z: grouped(q) * grouped(q) * s),
    "its scales are not shared by groups of 32, 64 or 128 of 240 columns": Arithmetic(
        lambda q, s, z: grouped(q, 48) * s, group=48, columns=240
    ),
    "its codes go from 0 to 1920, which 8 bits do not hold": Arithmetic(
        lambda q, s, z: (q.view(N, -1, 64).to(torch.int16) * 128).bfloat16() * s
    ),
    "its codes are a divisor": Arithmetic(lambda q, s, z: s / (grouped(q) + 0) * 2),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused(reason):
    module = REFUSED[reason]
    columns = module.codes.shape[1] if isinstance(module, Arithmetic) else K
    with pytest.raises(NotQuantized) as refused:
        read(module, columns)
    assert str(refused.value) == reason


def test_a_scale_that_overflows_is_compared():
    """float16 cannot hold what codes and scales say; the program computes infinity."""

    def compute(q, s, z):
        return ((grouped(q).half() - 8) * 9000).bfloat16() * s

    with pytest.raises(NotQuantized, match="the program computes other values"):
        read(Arithmetic(compute))
