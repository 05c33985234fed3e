"""The loop with a program made of tables: every call is checked, and the exact output is known."""

import itertools

import pytest
import torch

from flashpte.export.common.chunks import chunk_bounds
from flashpte.export.common.errors import ExportError, UsageError
from flashpte.export.speculative import Acceptance, Sampler, SpeculativeProgram, generate, greedy

VOCAB = 5


class TableProgram:
    """A target whose logits depend on the last two tokens, with caches that are checked at every call.

    A feature is (position, token there). The draft usually proposes the target's favorite.
    """

    def __init__(self, program, seed=0, spread=3.0):
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(VOCAB, VOCAB, VOCAB, generator=generator) * spread
        self.program = program
        self.kept = {"target": {}, "draft": {}}
        self.calls = []

    def logits(self, before, last):
        return self.table[before, last]

    def _write(self, cache, tokens, positions):
        assert positions.dtype == tokens.dtype == torch.int64
        assert tokens.shape == (1, len(positions))
        assert positions.tolist() == list(range(int(positions[0]), int(positions[0]) + len(positions)))
        assert 0 <= int(positions[0]) <= int(positions[-1]) < self.program.max_seq_len
        held = self.kept[cache]
        for position, token in zip(positions.tolist(), tokens[0].tolist(), strict=True):
            held[position] = token
        assert set(range(int(positions[0]))) <= held.keys()
        return held

    def _target(self, tokens, positions):
        held = self._write("target", tokens, positions)
        rows = [self.logits(held.get(p - 1, 0), held[p]) for p in positions.tolist()]
        features = torch.stack((positions.double(), tokens[0].double()), -1)[None]
        return torch.stack(rows)[None], features

    def __call__(self, method, *inputs):
        self.calls.append((method, inputs[0].shape[1]))
        return getattr(self, method)(*inputs)

    def prefill(self, tokens, positions):
        assert self.program.min_prefill_chunk <= len(positions) <= self.program.max_prefill_chunk
        logits, features = self._target(tokens, positions)
        return logits[:, -1:], features

    def target_verify(self, tokens, positions):
        assert len(positions) == self.program.verify_window
        return self._target(tokens, positions)

    def draft_decode(self, tokens, features, positions):
        assert 1 <= len(positions) <= self.program.max_draft_tokens
        # each row has the feature of its own position, and the draft reads the token after it
        assert features[0, :, 0].tolist() == positions.tolist()
        self._write("draft", tokens, positions)
        position, token = int(positions[-1]), int(tokens[0, -1])
        before = int(features[0, -1, 1])
        best = int(self.logits(before, token).argmax())
        proposal = best if (3 * position + 2 * token) % 5 < 3 else (best + 1) % VOCAB
        feature = torch.tensor([[[position + 1.0, token]]], dtype=torch.float64)
        return torch.tensor([[proposal]]), feature

    def greedily(self, prompt, count):
        tokens = list(prompt)
        for _ in range(count):
            before = tokens[-2] if len(tokens) > 1 else 0
            tokens.append(int(self.logits(before, tokens[-1]).argmax()))
        return tokens[len(prompt) :]


def sizes(chain=3, max_seq_len=40, least=2, most=4):
    return SpeculativeProgram(chain, max_seq_len, least, most, max(most, chain + 1))


@pytest.mark.parametrize("most", [2, 3, 4])
@pytest.mark.parametrize("chain", [1, 2, 5])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 9])
def test_greedy_is_the_targets_own(length, chain, most):
    program = sizes(chain, most=most)
    table = TableProgram(program)
    prompt = [(3 * i) % VOCAB for i in range(length)]
    got = generate(table, program, prompt, 20)
    assert list(got.tokens) == table.greedily(prompt, 20)
    assert got.stopped == "length"
    assert 0 < sum(got.acceptance.accepted) < sum(got.acceptance.offered)
    assert not {"decode"} & {method for method, _ in table.calls}


@pytest.mark.parametrize("length", [3, 10, 15, 16])
def test_the_caches_are_used_to_the_last_position(length):
    program = sizes(max_seq_len=16)
    table = TableProgram(program)
    got = generate(table, program, [1] * length, 100)
    assert list(got.tokens) == table.greedily([1] * length, 16 + 1 - length)
    assert got.stopped == "cache full"
    assert max(table.kept["target"]) == 15


def test_stop_tokens_end_it_with_the_token():
    program = sizes()
    table = TableProgram(program)
    expected = table.greedily([1, 2, 3], 30)
    for stop in set(expected):
        got = generate(table, program, [1, 2, 3], 30, stop_tokens={stop})
        assert list(got.tokens) == expected[: expected.index(stop) + 1]
        assert got.stopped == "stop token"


@pytest.mark.parametrize("count", range(1, 8))
def test_exactly_as_many_tokens_as_asked_for(count):
    program = sizes()
    table = TableProgram(program)
    told = []
    got = generate(table, program, [1, 2, 3], count, on_tokens=told.append)
    assert list(itertools.chain(*told)) == list(got.tokens) == table.greedily([1, 2, 3], count)


def test_a_chain_of_nothing_is_plain_decoding_through_verify():
    program = sizes()
    table = TableProgram(program)
    got = generate(table, program, [1, 2, 3], 10, chain=0)
    assert list(got.tokens) == table.greedily([1, 2, 3], 10)
    assert {method for method, _ in table.calls} == {"prefill", "target_verify"}
    assert got.acceptance.mean_accepted_length == 1.0


@pytest.mark.parametrize("forced", range(4))
def test_forced_acceptance_is_what_every_round_accepts(forced):
    program = sizes()
    got = generate(TableProgram(program), program, [1, 2, 3], 21, forced_acceptance=forced)
    full = [a for o, a in zip(got.acceptance.offered, got.acceptance.accepted, strict=True) if o == 3]
    assert full
    assert set(full) == {forced}
    assert len(got.tokens) == 21


def test_acceptance_counts():
    acceptance = Acceptance(3)
    assert acceptance.mean_accepted_length == 0.0
    assert acceptance.per_position == [None, None, None]
    for offered, accepted in ((3, 3), (3, 1), (3, 0), (1, 1)):
        acceptance.record(offered, accepted)
    assert acceptance.rounds == 4
    assert acceptance.mean_accepted_length == (4 + 2 + 1 + 2) / 4
    assert acceptance.per_position == [3 / 4, 1 / 3, 1 / 3]


def test_chunks_cover_the_prompt_and_fit():
    for length, least, most in itertools.product(range(1, 40), range(1, 6), range(1, 9)):
        if least > most or length < least:
            continue
        bounds = chunk_bounds(length, least, most, fed_twice=True)
        assert bounds[0][0] == 0
        assert bounds[-1][1] == length
        assert all(least <= end - start <= most for start, end in bounds)
        assert all(after[0] <= before[1] < after[1] for before, after in itertools.pairwise(bounds))


def test_a_prompt_shorter_than_a_prefill_goes_through_verify():
    program = sizes(chain=5, least=4, most=8)
    table = TableProgram(program)
    for length in (1, 2, 3):
        table.calls.clear()
        prompt = [2, 4, 1][:length]
        assert list(generate(table, program, prompt, 9).tokens) == table.greedily(prompt, 9)
        assert table.calls[0] == ("target_verify", 6)
        assert ("prefill", 4) not in table.calls


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [1] * 41}, "the prompt has 41 tokens, the program holds 40"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"chain": 4}, r"chain 4: the program was exported for 0\.\.3"),
        ({"forced_acceptance": 4}, r"forced_acceptance 4: must be 0\.\.3"),
        ({"revise": lambda tokens, proposals: [*proposals, 1]}, "revise returned 4 proposals, the draft made 3"),
        ({"program": sizes(chain=1, least=4, most=8), "prompt": [1, 2, 3]}, "one prefill takes at least 4"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_requests(change, named):
    request = {"program": sizes(), "prompt": [1, 2], "max_new_tokens": 9, **change}
    with pytest.raises(UsageError, match=named):
        generate(TableProgram(request["program"]), **request)


def test_sizes_come_from_the_constant_methods():
    constants = {
        "get_chain_len": 3,
        "get_max_seq_len": 40,
        "get_min_prefill_chunk": 2,
        "get_max_prefill_chunk": 4,
        "get_max_draft_tokens": 4,
        "get_vocab_size": 9,
    }
    assert SpeculativeProgram.from_constants(constants) == sizes()
    del constants["get_chain_len"]
    with pytest.raises(ExportError, match="no get_chain_len: it was exported without a draft"):
        SpeculativeProgram.from_constants(constants)


def test_greedy_accepts_a_prefix():
    logits = torch.nn.functional.one_hot(torch.tensor([3, 1, 2, 0]), VOCAB).float()
    assert greedy(logits, [3, 1, 2]) == (3, 0)
    assert greedy(logits, [3, 0, 2]) == (1, 1)
    assert greedy(logits, [0, 1, 2]) == (0, 3)
    assert greedy(logits[:1], []) == (0, 3)


def chi_square(counts, expected):
    """The statistic and its degrees of freedom; rare outcomes are pooled, and impossible ones must not occur."""
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    counts, expected = (torch.cat((x[common], x[~common].sum()[None])) for x in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    return float(((counts - expected) ** 2 / expected).sum()), len(expected) - 1


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.5, "top_k": 3}, {"temperature": 0.7, "top_p": 0.8}], ids=str
)
def test_samples_have_the_targets_distribution(settings):
    """Draws three tokens after a prompt, with proposals; their joint distribution is the product of the target's."""
    runs, program = 1500, sizes(chain=2)
    table = TableProgram(program, seed=1, spread=1.0)
    sampler = Sampler(**settings, generator=torch.Generator().manual_seed(0))
    prompt = [1, 2, 3]
    expected = torch.zeros(VOCAB, VOCAB, VOCAB, dtype=torch.float64)
    p = {
        pair: sampler.probabilities(table.logits(*pair)[None])[0] for pair in itertools.product(range(VOCAB), repeat=2)
    }
    for a, b, c in itertools.product(range(VOCAB), repeat=3):
        expected[a, b, c] = p[2, 3][a] * p[3, a][b] * p[a, b][c]
    assert abs(expected.sum() - 1) < 1e-12
    counts = torch.zeros_like(expected)
    accepted = rejected = 0
    for _ in range(runs):
        got = generate(table, program, prompt, 3, choose=sampler)
        counts[tuple(got.tokens)] += 1
        accepted += sum(got.acceptance.accepted)
        rejected += sum(o > a for o, a in zip(got.acceptance.offered, got.acceptance.accepted, strict=True))
    assert min(accepted, rejected) > runs / 20  # otherwise the test would say nothing about acceptance
    statistic, freedom = chi_square(counts, runs * expected)
    # mean: freedom, variance: 2 * freedom
    assert statistic < freedom + 4.5 * (2 * freedom) ** 0.5


def test_a_sampler_that_accepts_too_much_is_noticed():
    """The test above must detect a wrong rule: here every second rejection is ignored."""
    runs, sampler = 6000, Sampler(generator=torch.Generator().manual_seed(0))
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(2))
    p = sampler.probabilities(logits)[0]
    statistics = []
    for forgive in (False, True):
        counts = torch.zeros(VOCAB, dtype=torch.float64)
        for index in range(runs):
            accepted, token = sampler(logits, [1])
            counts[1 if accepted or (forgive and index % 2) else token] += 1
        statistics.append(chi_square(counts, runs * p)[0])
    assert statistics[0] < 4 + 4.5 * 8**0.5 < statistics[1]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 2}, [0, 1]),
        ({"top_p": 0.7}, [0, 1]),
        ({"top_p": 0.59}, [0]),
        ({"top_p": 0.01}, [0]),
    ],
    ids=str,
)
def test_top_k_and_top_p_keep_the_most_likely(settings, kept):
    logits = torch.tensor([[0.6, 0.2, 0.15, 0.05]], dtype=torch.float64).log()
    p = Sampler(**settings).probabilities(logits)[0]
    assert p.nonzero().flatten().tolist() == kept
    assert torch.allclose(p[kept], logits.exp()[0, kept] / logits.exp()[0, kept].sum())


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}], ids=str)
def test_sampler_settings_out_of_range(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Sampler(**settings)
