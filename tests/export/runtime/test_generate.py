"""Choosing tokens, stopping, streaming text, and statistics."""

import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flashpte.export.common.errors import ExportError, UsageError
from flashpte.export.runtime import ProgramError
from flashpte.export.runtime.generate import generate, sample
from flashpte.export.runtime.language_model import CacheFullError, LanguageModel
from flashpte.export.runtime.statistics import Statistics, percentile
from flashpte.export.runtime.text import StreamingText, encode_prompt, stop_ids


class Successor:
    """A language model that always predicts the next number and records what it was fed."""

    def __init__(self, length=32, vocabulary=16):
        from eager_program import signatures

        self.signatures = signatures({"prefill": (2, 8), "decode": (1, 1)}, vocabulary)
        self.constants = {"get_max_seq_len": length, "get_vocab_size": vocabulary}
        self.vocabulary, self.buffers, self.states, self.fed = vocabulary, {}, (), []

    def run(self, method, tokens, positions):
        assert positions.tolist() == list(range(len(self.fed), len(self.fed) + tokens.shape[1]))
        self.fed += tokens[0].tolist()
        logits = torch.zeros(1, 1, self.vocabulary)
        logits[0, 0, (self.fed[-1] + 1) % self.vocabulary] = 4.0
        return [logits]

    def reset(self):
        self.fed = []

    def synchronize(self):
        pass


def test_greedy_feeds_what_it_chose():
    program, shown = Successor(), []
    result = generate(LanguageModel(program), [3, 4, 5], max_new_tokens=4, on_token=shown.append)
    assert result.tokens == (6, 7, 8, 9)
    assert shown == [6, 7, 8, 9]
    assert program.fed == [3, 4, 5, 6, 7, 8]
    assert result.stopped == "length"
    assert len(result.steps) == 3


def test_a_stop_token_ends_it_and_is_not_shown():
    shown = []
    result = generate(LanguageModel(Successor()), [3], max_new_tokens=9, stop={6}, on_token=shown.append)
    assert (result.tokens, result.stopped, shown) == ((4, 5, 6), "stop token", [4, 5])


def test_a_cache_that_fills_up_gives_every_token_it_can_and_no_more():
    program = Successor(length=6)
    result = generate(LanguageModel(program), [0, 1, 2, 3], max_new_tokens=9)
    assert (result.tokens, result.stopped) == ((4, 5, 6), "cache full")
    assert program.fed == [0, 1, 2, 3, 4, 5]
    with pytest.raises(CacheFullError, match="has 7 tokens"):
        generate(LanguageModel(Successor(length=6)), [1] * 7, max_new_tokens=1)


@pytest.mark.parametrize(("prompt", "said"), [([], "empty"), ([3, 16], "token 16 is not"), ([-1], "token -1 is not")])
def test_prompts_that_are_none(prompt, said):
    with pytest.raises(UsageError, match=said):
        generate(LanguageModel(Successor()), prompt, max_new_tokens=1)


def test_sampling_follows_the_distribution():
    logits = torch.tensor([[[0.0, math.log(3.0), -50.0]]])
    generator = torch.Generator().manual_seed(0)
    drawn = [sample(logits, 1.0, generator) for _ in range(2000)]
    assert abs(drawn.count(1) / 2000 - 0.75) < 0.03
    assert 2 not in drawn
    cold = [sample(logits, 0.2, generator) for _ in range(500)]
    assert cold.count(1) > 490  # odds of (3 : 1) to the fifth power
    assert sample(logits, 0.0, None) == 1


def test_the_same_seed_gives_the_same_text():
    runs = [
        generate(LanguageModel(Successor()), [3], max_new_tokens=20, temperature=2.0, seed=seed).tokens
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_an_error(bad):
    logits = torch.zeros(1, 1, 8)
    logits[0, 0, 5] = bad
    for temperature in (0.0, 1.0):
        with pytest.raises(ProgramError, match="the logits hold"):
            sample(logits, temperature, torch.Generator())


@pytest.fixture(scope="module")
def byte_tokenizer():
    """One token per byte: characters beyond ASCII take several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


TEXT = "naïve 日本語 \N{GRINNING FACE} e\N{COMBINING ACUTE ACCENT}"


def test_pieces_are_whole_characters_and_add_up(byte_tokenizer):
    stream = StreamingText(byte_tokenizer)
    tokens = byte_tokenizer(TEXT)["input_ids"]
    assert len(tokens) == len(TEXT.encode())
    pieces = [stream.add(token) for token in tokens]
    assert "".join(pieces) == TEXT
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
    assert pieces.count("") == len(tokens) - len(TEXT)  # a character appears with its last byte
    assert stream.finish() == ""


def test_a_text_cut_in_the_middle_of_a_character(byte_tokenizer):
    stream = StreamingText(byte_tokenizer)
    tokens = byte_tokenizer("a日")["input_ids"]
    assert [stream.add(token) for token in tokens[:-1]] == ["a", "", ""]
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


def test_prompts_and_chat(byte_tokenizer):
    assert encode_prompt(byte_tokenizer, "hi", chat=False) == byte_tokenizer("hi")["input_ids"]
    with pytest.raises(ExportError, match="no chat template"):
        encode_prompt(byte_tokenizer, "hi", chat=True)
    byte_tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    try:
        asked = encode_prompt(byte_tokenizer, "hi", chat=True)
        byte_tokenizer.chat_template = "{{ raise_exception('no') }}"
        with pytest.raises(ExportError, match="the chat template failed"):
            encode_prompt(byte_tokenizer, "hi", chat=True)
    finally:
        byte_tokenizer.chat_template = None
    assert byte_tokenizer.decode(asked) == "<user>hi<a>"


def test_ids_that_stop(byte_tokenizer):
    assert stop_ids([1, 106], None) == {1, 106}
    byte_tokenizer.eos_token = "!"
    assert stop_ids([106], byte_tokenizer) == {106, byte_tokenizer.convert_tokens_to_ids("!")}


def test_percentiles():
    values = [float(i) for i in range(1, 101)]
    assert [percentile(values, share) for share in (0.5, 0.99, 1.0)] == [50.0, 99.0, 100.0]
    assert percentile([7.0], 0.99) == 7.0
    with pytest.raises(ValueError):
        percentile([], 0.5)


def test_statistics():
    found = Statistics(1.5, 100, 0.2, 0.25, (0.01, 0.02, 0.01, 0.04), 3 << 20, ("decode",))
    machine = found.to_dict()
    assert machine["prefill_tokens_per_s"] == pytest.approx(500)
    assert machine["decode_tokens_per_s"] == pytest.approx(50)
    assert (machine["decode_median_s"], machine["decode_p99_s"]) == (0.01, 0.04)
    text = "\n".join(found.lines())
    for part in (
        "1.50 s",
        "250.0 ms",
        "500.0 tokens/s",
        "4 tokens, 50.0 tokens/s",
        "p99 40.000 ms",
        "3.0 MiB",
        "decode",
    ):
        assert part in text
    nothing = Statistics(0.0, 1, 0.0, 0.0, ()).to_dict()
    assert nothing["decode_median_s"] is nothing["prefill_tokens_per_s"] is None
