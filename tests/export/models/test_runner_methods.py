"""Tokens that are sampled inside the program."""

import pytest
import torch

from flashpte.export.models.runner_methods import GREEDY_TEMPERATURE, sample


def temperature(value):
    return torch.tensor([value])


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-9, GREEDY_TEMPERATURE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_temperature_takes_the_most_likely_token(value, dtype):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        logits = torch.randn(1, 300, generator=generator).to(dtype)
        logits[0, [7, 200]] = logits.max()  # a tie goes to the lowest id, as with argmax
        token = sample(logits, temperature(value))
        assert (token.shape, token.dtype) == ((1, 1), torch.int64)
        assert int(token) == int(logits.argmax())


@pytest.mark.parametrize("value", [0.1, 0.7, 1.0, 2.0])
def test_draws_have_the_distribution_of_softmax(value):
    torch.manual_seed(1)
    count, size = 100_000, 12
    logits = 2 * torch.randn(size)
    drawn = sample(logits.expand(count, size), temperature(value))
    expected = count * torch.softmax(logits.double() / value, -1)
    found = torch.bincount(drawn.flatten(), minlength=size).double()
    kept = expected >= 5  # the approximation of chi-squared by a normal sum needs some draws in each class
    statistic = ((found - expected) ** 2 / expected)[kept].sum()
    freedom = int(kept.sum()) - 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5 + 5
    assert found[~kept].sum() <= 5 * (expected[~kept].sum() + 1)


def test_the_smallest_and_largest_random_numbers_are_finite(monkeypatch):
    for uniform in (0.0, 1 - 2**-24, 1.0):
        monkeypatch.setattr(torch, "rand_like", lambda x, dtype, u=uniform: torch.full_like(x, u, dtype=dtype))
        assert int(sample(torch.tensor([[1.0, 3.0, 2.0]]), temperature(1.0))) == 1
