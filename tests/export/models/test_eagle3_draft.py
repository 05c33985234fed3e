"""A draft read from files of either family, run step by step with its cache, against plain uncached math."""

import pytest
import torch
from drafts import (
    DRAFT_VOCAB,
    HEAD_DIM,
    HIDDEN,
    KV_HEADS,
    VOCAB,
    ReferenceDraft,
    draft_tensors,
    flat_config,
    speculators_config,
    write_draft,
)
from torch import nn

from flashpte.export.common.options import ExportOptions
from flashpte.export.models.build import ModelFacts
from flashpte.export.models.eagle3_methods import DraftMethod
from flashpte.export.models.registry import TargetSpec
from flashpte.export.pipeline.draft_plan import plan_draft
from flashpte.export.state.kv_cache import attention_state
from flashpte.export.state.model_state import ModelState

LAYERS = 8
LENGTH = 13
SPEC = TargetSpec("stub", "", (), build=lambda fields: None)
FACTS = ModelFacts(
    states=(attention_state(1, 8, None),) * LAYERS,
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    max_positions=128,
    window=None,
    bos_id=None,
    eos_ids=(),
)

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 16

YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8.0, "beta_slow": 1.0}
YARN["original_max_position_embeddings"] = 32

CASES = {
    "speculators": speculators_config(),
    "speculators, norm before residual": speculators_config(norm_before_residual=True),
    "speculators, norm before fc": speculators_config(norm_before_fc=True, tie_word_embeddings=False),
    "speculators, fc_norm and norm_output": speculators_config(fc_norm=True, norm_output=True),
    "speculators, qwen3": speculators_config({"model_type": "qwen3", "layer_types": ["full_attention"]}),
    "speculators, window": speculators_config({"layer_types": ["sliding_attention"], "sliding_window": 4}),
    "speculators, rope_parameters": speculators_config({"rope_parameters": {**LLAMA3, "rope_theta": 50.0}}),
    "flat": flat_config(),
    "flat, five taps": flat_config(eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 1, 3, 5, 7]}),
    "flat, 3.1": flat_config(fc_norm=True, norm_output=True),
    "flat, flags in eagle_config": flat_config(eagle_config={"norm_before_fc": True, "use_aux_hidden_state": True}),
    "flat, norm before residual": flat_config(norm_before_residual=True),
    "flat, linear rope, old name": flat_config(rope_scaling={"type": "linear", "factor": 2.0}),
    "flat, llama3 rope, theta": flat_config(rope_scaling=LLAMA3, rope_theta=100.0),
    "flat, yarn rope": flat_config(rope_scaling=YARN, rope_theta=50.0),
    "flat, biases": flat_config(attention_bias=True, mlp_bias=True),
    "flat, whole vocabulary": flat_config(draft_vocab_size=VOCAB),
    "flat, target hidden size": flat_config(hidden_size=32, head_dim=8, target_hidden_size=HIDDEN),
    "flat, tied": flat_config(draft_vocab_size=VOCAB, tie_word_embeddings=True),
}
OWN_EMBEDDING = ("flat, target hidden size", "flat, biases")


class Target(nn.Module):
    """The part of a target that a draft sees: an embedding, nested as in a Hugging Face model."""

    def __init__(self, weight):
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding.from_pretrained(weight)

    def get_input_embeddings(self):
        return self.model.embed_tokens


@pytest.fixture(scope="module")
def embedding():
    return torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(3))


def read(folder, embedding, chain=4):
    """The draft in a folder, its fusion, and a runner of its method with a cache of 32 positions."""
    plan = plan_draft(ExportOptions("stub", draft=folder, chain=chain), SPEC, FACTS)
    plan.load_weights(torch.float32, None)
    cache = ModelState([plan.head.attention], 32, torch.float32)
    for buffer in cache.buffers():
        buffer.fill_(3.0)
    return plan, DraftMethod(Target(embedding), plan.head, cache).eval()


def write_case(folder, name, **how):
    config = CASES[name]
    taps = 5 if "five taps" in name else 3
    tensors = draft_tensors(config, taps)
    if name in OWN_EMBEDDING:
        rows = config["hidden_size"]
        tensors["embed_tokens.weight"] = torch.randn(VOCAB, rows, generator=torch.Generator().manual_seed(4))
    if "tied" in name:
        del tensors["lm_head.weight"]
    return config, tensors, write_draft(folder, config, tensors, **how)


def run_chain(plan, method, tokens, taps, count, chunks):
    """Feeds a sequence in chunks and lets the draft continue; returns its proposals and the last feature."""
    features, start = plan.fusion([tap[None] for tap in taps]), 0
    with torch.no_grad():
        for size in chunks:
            rows = slice(start, start + size)
            proposal, feature = method(
                tokens[None, start + 1 : start + 1 + size], features[:, rows], torch.arange(start, start + size)
            )
            start += size
        proposals = [int(proposal)]
        for step in range(count - 1):
            proposal, feature = method(proposal, feature, torch.tensor([start + step]))
            proposals.append(int(proposal))
    assert start == len(tokens) - 1
    assert proposal.shape == (1, 1)
    return proposals, feature[0, 0]


@pytest.fixture(scope="module")
def sequence():
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, VOCAB, (LENGTH,), generator=generator)
    return tokens, torch.randn(5, LENGTH - 1, HIDDEN, generator=generator)


@pytest.mark.parametrize("name", CASES)
def test_every_flag_that_changes_the_maths(tmp_path, embedding, sequence, name):
    config, tensors, folder = write_case(tmp_path, name, shards=2 if "3.1" in name or name == "speculators" else 1)
    tokens, taps = sequence
    taps = taps[: 5 if "five taps" in name else 3]
    reference = ReferenceDraft(config, tensors, embedding)
    expected = reference.chain(tokens, taps, 4)
    plan, method = read(folder, embedding)
    # a ring of four positions takes at most four rows; the cache of a draft with full attention takes all at once
    chunks = (4, 4, 4) if "window" in name else (7, 5)
    got, feature = run_chain(plan, method, tokens, taps, 4, chunks)
    assert got == expected
    longer = torch.cat((tokens, torch.tensor(expected[:3])))
    features = reference.fuse(taps)
    for count in range(4):
        _, last = reference.step(longer[1 : LENGTH + count], features)
        features = torch.cat((features, last[None]))
    assert (feature - features[-1]).abs().max() < 1e-4 * features[-1].abs().max()
    assert (method.draft.embed_tokens is None) == (name not in OWN_EMBEDDING)


def test_the_flags_change_the_maths(embedding, sequence):
    """Otherwise the test above would pass for an implementation that ignores them."""
    tokens, taps = sequence
    outputs = {}
    for flags in (
        {},
        {"norm_before_residual": True},
        {"norm_output": True},
        {"fc_norm": True},
        {"norm_before_fc": True},
    ):
        config = speculators_config(**flags)
        reference = ReferenceDraft(config, draft_tensors(config), embedding)
        outputs[str(flags)] = torch.stack(
            [reference.step(tokens[1:], reference.fuse(taps[:3]))[1], reference.fuse(taps[:3])[-1]]
        )
    names = list(outputs)
    for i, a in enumerate(names):
        for b in names[:i]:
            assert (outputs[a] - outputs[b]).abs().max() > 0.05, (a, b)


@pytest.mark.parametrize("prefix", ["midlayer.", "layers.0."])
def test_either_name_of_the_layer_with_either_config(tmp_path, embedding, sequence, prefix):
    tokens, taps = sequence
    config = flat_config()
    tensors = draft_tensors(config)
    folder = write_draft(tmp_path, config, tensors, prefix=prefix)
    got, _ = run_chain(*read(folder, embedding), tokens, taps[:3], 3, (12,))
    assert got == ReferenceDraft(config, tensors, embedding).chain(tokens, taps[:3], 3)


def test_a_row_alone_is_the_row_in_a_chunk(tmp_path, embedding, sequence):
    tokens, taps = sequence
    _, _, folder = write_case(tmp_path, "flat")
    plan, method = read(folder, embedding)
    at_once = run_chain(plan, method, tokens, taps[:3], 2, (12,))
    one_by_one = run_chain(plan, method, tokens, taps[:3], 2, (1,) * 12)
    assert at_once[0] == one_by_one[0]
    assert (at_once[1] - one_by_one[1]).abs().max() < 1e-4


def test_taps_of_both_numberings(tmp_path):
    """vLLM numbers hidden states from the embedding; SpecForge and SGLang number the layers that output them."""
    wanted = {}
    for name, config in (
        ("default", flat_config()),
        ("flat, nested", flat_config(eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 3, 4]})),
        ("flat, top", flat_config(eagle_aux_hidden_state_layer_ids=[1, 3, 4])),
        ("speculators", speculators_config(eagle_aux_hidden_state_layer_ids=[0, 3, 8])),
    ):
        folder = write_draft(tmp_path / name, config, draft_tensors(config))
        wanted[name] = plan_draft(ExportOptions("stub", draft=folder), SPEC, FACTS).taps
    assert wanted == {
        "default": (2, 4, 5),
        "flat, nested": (2, 4, 5),
        "flat, top": (1, 3, 4),
        "speculators": (0, 3, 8),
    }


def test_a_random_draft_fits_and_is_the_same_for_the_same_seed():
    options = ExportOptions("stub", random_seed=3, chain=2)
    drafts = []
    for seed in (3, 3, 4):
        plan = plan_draft(options, SPEC, FACTS)
        plan.load_weights(torch.float32, seed)
        drafts.append({**plan.fusion.state_dict(), **plan.head.state_dict()})
        targets = torch.arange(plan.config.draft_vocab_size) + plan.head.d2t
        assert plan.head.d2t.dtype == torch.int64
        assert len(targets.unique()) == VOCAB // 2 != DRAFT_VOCAB
        assert 0 <= targets.min() <= targets.max() < VOCAB
    assert all(torch.equal(drafts[0][name], drafts[1][name]) for name in drafts[0])
    assert not any(torch.equal(drafts[0][name], drafts[2][name]) for name in drafts[0])


def test_the_cache_has_the_drafts_own_shape(tmp_path, embedding):
    _, _, folder = write_case(tmp_path, "speculators, window")
    plan, _ = read(folder, embedding)
    assert plan.head.attention == attention_state(KV_HEADS, HEAD_DIM, 4)
    assert plan.window == 4
