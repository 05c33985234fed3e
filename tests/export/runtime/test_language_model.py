"""Prompts in chunks, positions, and a full cache."""

import pytest
import torch
from eager_program import signatures
from hypothesis import given
from hypothesis import strategies as st

from flashpte.export.common.errors import UsageError
from flashpte.export.runtime import ProgramError
from flashpte.export.runtime.language_model import CacheFullError, LanguageModel, Limits, plan_chunks, read_limits
from flashpte.export.state.layer_state import StateRules


class Recorder:
    """A program that records its calls and answers with the last token and position."""

    def __init__(self, methods, length=64, states=()):
        self.signatures = signatures(methods)
        self.constants = {"get_max_seq_len": length, "get_vocab_size": 512}
        self.buffers, self.states = {}, states
        self.calls = []

    def run(self, method, *inputs):
        self.signatures[method].check(inputs)
        tokens, positions = inputs
        self.calls.append((method, tokens[0].tolist(), positions.tolist()))
        return [torch.full((1, 1, 512), float(tokens[0, -1]))]

    def reset(self):
        self.calls.clear()

    def synchronize(self):
        pass


@given(count=st.integers(1, 5000), low=st.integers(1, 40), spread=st.integers(0, 1000), decode=st.booleans())
def test_chunks_add_up_and_are_admitted(count, low, spread, decode):
    limits = Limits(5000, (low, low + spread), decode, None)
    try:
        chunks = plan_chunks(count, limits)
    except ProgramError:
        # only if no admitted sizes add up
        assert not decode
        assert all(not low * n <= count <= (low + spread) * n for n in range(1, count + 1))
        return
    assert sum(size for _, size in chunks) == count
    for method, size in chunks:
        assert low <= size <= low + spread if method == "prefill" else size == 1
    if chunks[0][0] == "prefill":
        assert len(chunks) == -(-count // (low + spread))


@pytest.mark.parametrize(
    ("count", "chunks"),
    [
        (2, [2]),
        (64, [64]),
        (65, [63, 2]),
        (66, [64, 2]),
        (130, [64, 64, 2]),
        (129, [64, 63, 2]),
    ],
)
def test_a_rest_that_is_too_short_takes_from_the_chunk_before(count, chunks):
    assert plan_chunks(count, Limits(4096, (2, 64), True, None)) == [("prefill", size) for size in chunks]


def test_prompts_that_prefill_does_not_take():
    assert plan_chunks(1, Limits(64, (2, 64), True, None)) == [("decode", 1)]
    assert plan_chunks(3, Limits(64, None, True, None)) == [("decode", 1)] * 3
    with pytest.raises(ProgramError, match=r"no method takes a prompt of 1 tokens: prefill takes 2\.\.64"):
        plan_chunks(1, Limits(64, (2, 64), False, None))
    with pytest.raises(CacheFullError, match="the prompt has 65 tokens, the cache holds 64"):
        plan_chunks(65, Limits(64, (2, 64), True, None))
    with pytest.raises(UsageError, match="empty"):
        plan_chunks(0, Limits(64, (2, 64), True, None))


def test_limits_are_the_narrower_of_shapes_and_constants():
    methods = signatures({"prefill": (2, 64), "decode": (1, 1), "target_verify": (5, 5)})
    constants = {"get_max_seq_len": 100, "get_min_prefill_chunk": 4, "get_max_prefill_chunk": 32}
    assert read_limits(methods, constants) == Limits(100, (4, 32), True, 5)
    assert read_limits(methods, {"get_max_seq_len": 40}) == Limits(40, (2, 40), True, 5)
    assert read_limits({"decode": methods["decode"]}, {"get_max_seq_len": 8}) == Limits(8, None, True, None)
    with pytest.raises(ProgramError, match="not a language model: it has the methods forward"):
        read_limits({"forward": methods["decode"]}, constants)
    with pytest.raises(ProgramError, match="how many positions"):
        read_limits(methods, {})


def test_positions_follow_each_other():
    program = Recorder({"prefill": (2, 4), "decode": (1, 1), "target_verify": (3, 3)}, length=12)
    model = LanguageModel(program)
    assert float(model.prefill([1, 2, 3, 4, 5])[0, 0, 0]) == 5
    model.decode(6)
    model.call("target_verify", [7, 8, 9])
    model.move_back(7)
    model.decode(10)
    assert [(method, positions) for method, _, positions in program.calls] == [
        ("prefill", [0, 1, 2]),
        ("prefill", [3, 4]),
        ("decode", [5]),
        ("target_verify", [6, 7, 8]),
        ("decode", [7]),
    ]
    assert model.position == 8
    with pytest.raises(UsageError, match="cannot go to position 9 from 8"):
        model.move_back(9)


def test_a_state_says_how_far_it_goes_back():
    states = (StateRules("full", {}), StateRules("sliding", {}, most_back=4), StateRules("sliding", {}, most_back=5))
    model = LanguageModel(Recorder({"prefill": (2, 8), "decode": (1, 1)}, states=states))
    model.prefill(range(20))
    with pytest.raises(UsageError, match="cannot go back to position 15: 20 were fed, and a layer goes back by 4"):
        model.move_back(15)
    model.move_back(16)
    model.decode(1)
    with pytest.raises(UsageError, match="position 15"):  # positions before 20 are still in the ring
        model.move_back(15)
    model.prefill(range(8))
    model.move_back(21)
    model.move_back(0)  # a new sequence overwrites everything before reading it
    model.prefill(range(8))
    model.move_back(4)
    assert model.position == 4


def test_nothing_runs_when_it_would_not_fit():
    program = Recorder({"prefill": (2, 4), "decode": (1, 1)}, length=6)
    model = LanguageModel(program)
    model.prefill([1, 2, 3, 4])
    before = list(program.calls)
    with pytest.raises(CacheFullError, match="the prompt has 3 tokens, the cache has 2 of its 6 positions left"):
        model.prefill([5, 6, 7])
    assert program.calls == before
    model.decode(5)
    model.decode(6)
    with pytest.raises(CacheFullError, match="the cache is full: it holds 6 positions, decode would write up to 7"):
        model.decode(7)
    assert len(program.calls) == len(before) + 2
    assert model.position == 6
