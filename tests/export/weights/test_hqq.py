"""Half-quadratic quantization: nearer than rounding in its own norm, no worse in results, and the same everywhere."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from flashpte.export.weights import hqq
from flashpte.export.weights.formats import FORMATS
from flashpte.export.weights.quantized import QuantizedLinear

GROUPS = (32, 64, 128)


def heavy_tailed(rows=96, columns=512):
    """Student's t with 4 degrees of freedom, the size of real weights."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(5, rows, columns, generator=generator)
    return 0.02 * normal[0] / normal[1:].square().mean(0).sqrt()


def read_back(name, weight):
    module = QuantizedLinear(FORMATS[name].format_of(weight.shape), False, torch.float32)
    tensors = FORMATS[name].encode("a.weight", weight)
    module.load_state_dict({key.removeprefix("a."): tensor for key, tensor in tensors.items()})
    return module.dequantized()


def norms(name, weight):
    """The l_p norm with p = 1/2, and the error of a product with random activations; relative to the weight's own."""
    error = read_back(name, weight) - weight
    x = torch.randn(64, weight.shape[1], generator=torch.Generator().manual_seed(1))
    return (
        float(error.abs().sqrt().sum() / weight.abs().sqrt().sum()),
        float((x @ error.T).norm() / (x @ weight.T).norm()),
    )


def where_it_starts(measure, group, weight):
    """What ``measure`` gives for the zero points that the iterations start from."""
    with mock.patch.object(hqq, "ITERATIONS", 0):
        return measure(f"int4-g{group}-hqq", weight)


def is_better(group, weight):
    """Whether both norms are smaller than without iterations, and much smaller than those of symmetric rounding."""
    found, symmetric = (norms(f"int4-g{group}{suffix}", weight) for suffix in ("-hqq", ""))
    without = where_it_starts(norms, group, weight)
    closer = all(mine < 0.995 * other for mine, other in zip(found, without, strict=True))
    return closer and all(mine < 0.95 * other for mine, other in zip(found, symmetric, strict=True))


@pytest.mark.parametrize("group", GROUPS)
def test_it_is_nearer_than_rounding(group):
    assert is_better(group, heavy_tailed())


def test_without_iterations_it_is_rounding(monkeypatch):
    monkeypatch.setattr(hqq, "ITERATIONS", 0)
    assert not is_better(32, heavy_tailed())
    grouped = heavy_tailed().unflatten(1, (-1, 32))
    for found, expected in zip(
        hqq.choose_zeros(grouped, 16, torch.bfloat16, 32), hqq.choose_range(grouped, 16, torch.bfloat16), strict=True
    ):
        assert torch.equal(found, expected)


def test_without_the_other_half_it_is_only_the_mean(monkeypatch):
    """A huge penalty makes the auxiliary error the real one, and zero points stay."""
    monkeypatch.setattr(hqq, "BETA", 1e12)
    assert not is_better(32, heavy_tailed())


@pytest.mark.parametrize("group", GROUPS)
def test_no_group_becomes_worse(group):
    weight = heavy_tailed()
    after, before = (
        (read - weight).abs().sqrt().unflatten(1, (-1, group)).sum(-1)
        for read in (read_back(f"int4-g{group}-hqq", weight), where_it_starts(read_back, group, weight))
    )
    assert bool((after <= before * (1 + 1e-4)).all())
    assert bool((after < before).any())


def test_results_do_not_depend_on_threads_or_parts(monkeypatch):
    weight = heavy_tailed()
    expected = read_back("int4-g32-hqq", weight)
    monkeypatch.setattr(hqq, "_ELEMENTS", 1)
    assert torch.equal(read_back("int4-g32-hqq", weight), expected)
    assert torch.equal(read_back("int4-g32-hqq", weight[10:20]), expected[10:20])


def test_padding_of_the_last_group_counts_for_nothing():
    weight = heavy_tailed(columns=512)[:, : 3 * 64 + 40]
    scales, zeros = hqq.choose_zeros(weight[:, None, -40:].contiguous(), 16, torch.bfloat16, 40)
    padded = torch.nn.functional.pad(weight, (0, 24)).unflatten(1, (4, 64))
    found = hqq.choose_zeros(padded, 16, torch.bfloat16, 40)
    assert torch.equal(found[0][:, -1:], scales)
    # Sums of another length are rounded differently.
    assert float((found[1][:, -1:].float() - zeros.float()).abs().mean()) < 0.02


@pytest.mark.parametrize("name", ["int4-g32-z", "int4-g32-hqq"])
def test_weights_that_codes_hold_exactly(name):
    weight = torch.randint(0, 16, (16, 64), generator=torch.Generator().manual_seed(0)).float()
    weight[:, ::32], weight[:, 1::32] = 0, 15
    weight = (weight - 6) * 0.25
    weight[3], weight[4, :32] = 0, 0.25 * 15  # a row of zeros, and a group of one value
    assert torch.equal(read_back(name, weight), weight)
