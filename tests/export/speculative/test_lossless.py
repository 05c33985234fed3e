"""Speculative decoding on exported and rewritten programs equals the Hugging Face model without a cache."""

import dataclasses

import pytest
import torch
from drafts import ReferenceDraft, draft_tensors, speculators_config, write_draft
from shared_programs import SharedPrograms

from flashpte.export.common.options import TARGET_VERIFY, ExportOptions
from flashpte.export.models.eagle3_methods import recorded_taps
from flashpte.export.pipeline import export_programs, plan_export, replace_attention
from flashpte.export.speculative import SpeculativeProgram, generate, greedy

pytestmark = pytest.mark.xdist_group("lossless")

CHAINS = (1, 3, 4, 7)
WINDOW, RING, CHUNK, LENGTH = 8, 16, 8, 48
LAYERS = ["sliding_attention", "sliding_attention", "full_attention"]
TAPS = (0, 1, 2)
VOCAB = 96


@dataclasses.dataclass
class Setup:
    """A target with a draft, exported for several chains, and the original models."""

    model: torch.nn.Module
    draft: ReferenceDraft
    programs: dict
    sizes: dict
    runners: dict = dataclasses.field(default_factory=dict)

    def run(self, kind, chain):
        """Runs the methods of one chain, on caches that hold results of earlier runs; at first they hold 3.0."""
        if (kind, chain) not in self.runners:
            prefill, draft_decode, verify = self.programs[kind]
            methods = {"prefill": prefill, "draft_decode": draft_decode, TARGET_VERIFY: verify[chain]}
            self.runners[kind, chain] = SharedPrograms(methods).run
        return self.runners[kind, chain]

    def greedily(self, prompt, count):
        """Tokens after a prompt from the Hugging Face model without a cache: it reads the whole sequence every time."""
        tokens = list(prompt)
        with torch.no_grad():
            for _ in range(count):
                tokens.append(int(self.model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def setup(tmp_path_factory, tiny, reference):
    folder = tmp_path_factory.mktemp("speculative")
    fields = {**tiny("gemma4"), "num_hidden_layers": len(LAYERS), "max_position_embeddings": 256}
    # with random weights, a head tied to the embedding repeats the last token forever, whatever attention does
    model = reference({**fields, "tie_word_embeddings": False})
    assert model.config.layer_types == LAYERS
    model.save_pretrained(folder / "target")
    config = speculators_config(norm_before_residual=True, norm_output=True, eagle_aux_hidden_state_layer_ids=TAPS)
    tensors = draft_tensors(config)
    write_draft(folder / "draft", config, tensors)
    options = ExportOptions(
        "gemma4-31b",
        checkpoint=folder / "target",
        draft=folder / "draft",
        dtype="float32",
        max_seq_len=LENGTH,
        max_prefill_chunk=CHUNK,
    )
    longest = plan_export(dataclasses.replace(options, chain=max(CHAINS)))
    exported = export_programs(longest)
    verify, sizes = {max(CHAINS): exported[TARGET_VERIFY]}, {}
    for chain in CHAINS:
        plan = plan_export(dataclasses.replace(options, chain=chain))
        sizes[chain] = SpeculativeProgram.from_constants(plan.constant_methods)
        if chain != max(CHAINS):
            plan = plan_export(dataclasses.replace(options, chain=chain, method=TARGET_VERIFY, max_prefill_chunk=None))
            verify |= {chain: export_programs(plan)[TARGET_VERIFY]}
    programs = {"exported": (exported["prefill"], exported["draft_decode"], verify)}
    everything = {**{str(chain): program for chain, program in verify.items()}, **exported}
    rewritten, reports = replace_attention(everything)
    assert all(report.replaced and not report.declined for report in reports.values())
    programs["rewritten"] = (
        rewritten["prefill"],
        rewritten["draft_decode"],
        {chain: rewritten[str(chain)] for chain in CHAINS},
    )
    draft = ReferenceDraft(config, tensors, model.get_input_embeddings().weight.detach())
    return Setup(model, draft, programs, sizes)


@pytest.fixture(scope="module")
def prompt():
    return torch.randint(0, VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def continuations(setup, prompt):
    """The reference's continuations of prefixes of the prompt, to the end of the caches; each is computed once."""
    made = {}

    def get(length):
        if length not in made:
            made[length] = setup.greedily(prompt[:length], LENGTH + 1 - length)
            # a text that repeats itself would hide wrong positions
            assert len(set(made[length])) > len(made[length]) / 3
        return made[length]

    return get


def accept_exactly(expected, start, pattern):
    """Proposals of which the target accepts the pattern's number in each round."""
    rounds = iter(range(10**6))

    def revise(tokens, proposals):
        accepted = min(pattern[next(rounds) % len(pattern)], len(proposals))
        right = expected[len(tokens) - start :][: len(proposals)]
        right += [0] * (len(proposals) - len(right))
        return right[:accepted] + [(token + 1) % VOCAB for token in right[accepted:]]

    return revise


@pytest.mark.parametrize("kind", ["exported", "rewritten"])
@pytest.mark.parametrize("chain", CHAINS)
def test_every_acceptance_in_turn_across_the_window_and_the_ring(setup, prompt, continuations, kind, chain):
    """Runs from before the window's edge to the end of the caches, three times around the ring."""
    upwards, seen = [*range(chain + 1)], set()
    for length, pattern in ((5, upwards), (20, upwards[::-1])):
        expected = continuations(length)
        got = generate(
            setup.run(kind, chain),
            setup.sizes[chain],
            prompt[:length],
            len(expected) + 5,
            revise=accept_exactly(expected, length, pattern),
        )
        assert list(got.tokens) == expected
        assert got.stopped == "cache full"
        seen.update(got.acceptance.accepted)
    assert seen == {*range(chain + 1)}


@pytest.mark.parametrize("chain", [4])
@pytest.mark.parametrize("edge", [WINDOW, RING, 2 * RING], ids=["window", "ring", "second-lap"])
def test_rejection_at_every_position_on_both_sides_of_an_edge(setup, prompt, continuations, chain, edge):
    """The first round after the prompt starts before, at or after the edge and accepts 0..K; another round follows."""
    for length in range(edge - 2, edge + 2):
        expected = continuations(length)[: 2 * chain + 2]
        for accepted in range(chain + 1):
            got = generate(
                setup.run("rewritten", chain),
                setup.sizes[chain],
                prompt[:length],
                len(expected),
                revise=accept_exactly(expected, length, [accepted, 1]),
            )
            assert list(got.tokens) == expected, (length, accepted)
            assert got.acceptance.accepted[0] == accepted


@pytest.mark.parametrize("chain", [4, 7])
def test_what_the_draft_itself_proposes(setup, prompt, continuations, chain):
    """The draft's own proposals are nearly all wrong here; plain decoding with target_verify gives the same tokens."""
    expected = continuations(13)[:20]
    for limit in (0, 1, chain):
        run = setup.run("rewritten", chain)
        assert list(generate(run, setup.sizes[chain], prompt[:13], 20, chain=limit).tokens) == expected


def test_a_second_prompt_needs_no_reset(setup, prompt, continuations):
    run, sizes = setup.run("rewritten", 4), setup.sizes[4]
    generate(run, sizes, prompt[::-1][:30], 15)
    assert list(generate(run, sizes, prompt[:13], 12).tokens) == continuations(13)[:12]


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_rollback_that_is_off_by_one_is_noticed(setup, prompt, continuations, shift):
    """After a rejection, the next call is one position too early or too late, so the output must change."""
    chain, expected = 4, continuations(13)[:20]
    run, rejected = setup.run("rewritten", chain), [False]

    def choose(logits, proposals):
        accepted, token = greedy(logits, proposals)
        rejected[0] = accepted < len(proposals)
        return accepted, token

    def off_by_one(method, *inputs):
        if method == TARGET_VERIFY and rejected[0]:
            inputs = (*inputs[:-1], inputs[-1] + shift)
        return run(method, *inputs)

    outputs = []
    for runner in (run, off_by_one):
        revise = accept_exactly(expected, 13, [2, 0, 3])
        outputs.append(generate(runner, setup.sizes[chain], prompt[:13], 20, choose=choose, revise=revise).tokens)
    assert list(outputs[0]) == expected
    assert list(outputs[1]) != expected


@pytest.mark.parametrize("kind", ["exported", "rewritten"])
def test_the_draft_proposes_what_uncached_maths_proposes(setup, prompt, continuations, kind):
    """Checks taps, fusion, positions, d2t and the draft's cache after every round with acceptance and rejection."""
    chain, length = 4, 7
    expected = continuations(length)
    inject = accept_exactly(expected, length, [1, 4, 0, 2, 3])
    seen = []

    def revise(tokens, proposals):
        seen.append((list(tokens), proposals))
        return inject(tokens, proposals)

    generate(setup.run(kind, chain), setup.sizes[chain], prompt[:length], 24, revise=revise)
    assert len(seen) > 5
    for tokens, proposals in seen:
        with torch.no_grad():
            output = setup.model(torch.tensor([tokens[:-1]]), use_cache=False, output_hidden_states=True)
        taps = [output.hidden_states[tap][0] for tap in TAPS]
        assert setup.draft.chain(torch.tensor(tokens), taps, len(proposals)) == proposals


def test_taps_are_the_models_hidden_states(setup, prompt):
    """Tap 0 is the embedding, k the output of layer k - 1: Hugging Face's hidden_states[k], except for the last."""
    tokens = torch.tensor([prompt[:9]])
    layers = setup.model.model.layers
    hooks = [len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in layers]
    with recorded_taps(setup.model, (0, 3)):
        pass
    assert hooks == [len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in layers]
    with torch.no_grad(), recorded_taps(setup.model, (*TAPS, 3)) as found:
        output = setup.model(tokens, use_cache=False, output_hidden_states=True)
    for tap in TAPS:
        assert torch.equal(found[tap], output.hidden_states[tap])
    with torch.no_grad():
        assert torch.equal(setup.model.model.norm(found[3]), output.hidden_states[3])
