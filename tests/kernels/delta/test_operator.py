"""The operator of the delta rule on a CPU: values, contract, and that PyTorch can trace it."""

import dataclasses
import inspect

import pytest
import torch
from delta_cases import Case, answers, build, chunked_formula
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

from flashpte.kernels import delta_recurrent
from flashpte.kernels.delta.call import why_not


def arguments(call):
    return [getattr(call, field.name) for field in dataclasses.fields(call)]


@pytest.mark.parametrize("case", [Case(1), Case(5, batch=2, heads_k=2, heads=6, state=False, l2norm=False)], ids=str)
def test_it_is_the_definition(case):
    call = build(case)
    out, state = delta_recurrent(*arguments(call))
    wanted, wanted_state = answers(call)
    torch.testing.assert_close(out.double(), wanted, rtol=2**-10, atol=1e-5)
    torch.testing.assert_close(state.double(), wanted_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 70])
@pytest.mark.parametrize("state", [False, True])
def test_the_definition_is_that_of_transformers(length, state):
    call = build(Case(length, heads_k=2, heads=4, dtype=torch.float32, state=state))
    recurrent = inspect.unwrap(torch_recurrent_gated_delta_rule)(
        *arguments(call)[:5], initial_state=call.state, output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    for found in (recurrent, chunked_formula(call)):
        for tensor, wanted in zip(found, answers(call), strict=True):
            torch.testing.assert_close(tensor.double(), wanted, rtol=1e-4, atol=1e-5)


CHANGES = [
    ({"query": torch.randn(1, 3, 32).half()}, "query has 3 dimensions"),
    ({"query": torch.randn(1, 3, 1, 32)}, "dtypes torch.float32, torch.float16, torch.float16"),
    ({"query": torch.randn(1, 4, 1, 32).half()}, "query has the sizes [1, 4, 1, 32], the value asks for [1, 3, 1, 32]"),
    ({"g": torch.zeros(1, 3, 2).half()}, "g has dtype torch.float16"),
    ({"g": torch.zeros(1, 3, 1)}, "g has the sizes [1, 3, 1], the value asks for [1, 3, 2]"),
    ({"beta": torch.zeros(1, 3, 2).double()}, "beta has dtype torch.float64"),
    ({"beta": torch.zeros(3, 2)}, "beta has the sizes [3, 2]"),
    ({"state": torch.zeros(1, 2, 32, 32).half()}, "the state has dtype torch.float16"),
    ({"state": torch.zeros(1, 1, 32, 32)}, "state has the sizes [1, 1, 32, 32]"),
    ({"key": torch.zeros(1, 3, 3, 32).half()}, "2 value heads on 3 key heads"),
    ({"key": torch.zeros(1, 3, 1, 257).half()}, "key head dim 257 is above 256"),
    ({"value": torch.zeros(1, 3, 2, 257).half()}, "value head dim 257 is above 256"),
]


@pytest.mark.parametrize(("change", "said"), CHANGES, ids=[said for _, said in CHANGES])
@pytest.mark.parametrize("fake", [False, True], ids=["cpu", "fake"])
def test_what_does_not_fit_is_refused(change, said, fake):
    call = dataclasses.replace(build(Case(3)), **change)
    given = arguments(call)
    if fake:
        mode = torch._subclasses.FakeTensorMode()
        given = [mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in given]
    assert said in why_not(call)
    with pytest.raises(ValueError) as refused:
        delta_recurrent(*given)
    assert said in str(refused.value)


@pytest.mark.parametrize(("k_dim", "v_dim", "said"), [(40, 32, "key head dim 40"), (32, 144, "value head dim 144")])
def test_chunked_takes_multiples_of_16(k_dim, v_dim, said):
    call = build(Case(3, k_dim=k_dim, v_dim=v_dim))
    delta_recurrent(*arguments(call))
    assert why_not(call) == f"{said}: the chunked kernels take multiples of 16 up to 128"


def test_recurrent_takes_at_most_16_tokens():
    call = build(Case(17))
    assert why_not(call) is None
    with pytest.raises(ValueError, match="at most 16 tokens, got 17"):
        delta_recurrent(*arguments(call))


@pytest.mark.parametrize("state", [False, True])
def test_opcheck(state):
    given = tuple(arguments(build(Case(3, state=state))))
    torch.library.opcheck(delta_recurrent, given, test_utils=("test_schema", "test_faketensor"))


def test_a_dynamic_length_is_traced():
    class Model(torch.nn.Module):
        def forward(self, query, key, value, g, beta, state):
            return delta_recurrent(query, key, value, g, beta, state, 0.25, True)

    length = torch.export.Dim("length", min=1, max=16)
    shapes = [{1: length}] * 5 + [None]
    program = torch.export.export(Model(), tuple(arguments(build(Case(7)))[:6]), dynamic_shapes=tuple(shapes))
    given = arguments(build(Case(12)))[:6]
    out, _ = program.module()(*given)
    assert out.shape == (1, 12, 2, 32)
