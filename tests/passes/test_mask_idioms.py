"""The ways in which models write masks: each is proven, and similar masks that are something else stay tensors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from programs import assert_same_attention, calls, check_maps, exported, fresh_module, mask_tensors, qkv
from torch.export import Dim

from flashpte.passes import replace_sdpa

pytestmark = pytest.mark.xdist_group("mask idioms")  # their programs take 25 s each

KEYS, WINDOW = 200, 30
NEG_INF, MIN = float("-inf"), torch.finfo(torch.float32).min
arange, where = torch.arange, torch.where


def causal(pos):
    return arange(KEYS) <= pos[:, None]


def near(pos, width=WINDOW):
    return (pos[:, None] - arange(KEYS)).abs() <= width


def late(pos):
    return arange(KEYS) > pos[:, None] - WINDOW


# name: (mask of (module, pos, extra), its name in the report)
PROVEN = {
    # A triangle kept as a constant.
    "indexed triangle": (lambda m, p, e: m.tril[p % 400], "causal"),
    "indexed triangle of 4 dimensions": (lambda m, p, e: m.tril[None, None, p % 400], "causal"),
    "selected triangle": (lambda m, p, e: m.tril.index_select(0, p % 400), "causal"),
    "narrowed triangle": (lambda m, p, e: m.tril.narrow(0, 3, p.shape[0]), "causal"),
    "sliced triangle": (lambda m, p, e: m.tril[: p.shape[0]], "causal"),
    "triangle of what is hidden": (lambda m, p, e: ~m.above[p % 400], "causal"),
    "band": (lambda m, p, e: m.band[p % 400], "window"),
    "float triangle": (lambda m, p, e: m.float_tril[p % 400], "causal"),
    "triangle of minima": (lambda m, p, e: m.min_tril[p % 400], "causal"),
    "plain attribute": (lambda m, p, e: m.attribute[p % 400], "causal"),
    # Comparisons of bools.
    "equals true": (lambda m, p, e: causal(p) == True, "causal"),  # noqa: E712
    "differs from false": (lambda m, p, e: causal(p) != False, "causal"),  # noqa: E712
    "equals false": (lambda m, p, e: (arange(KEYS) > p[:, None]) == False, "causal"),  # noqa: E712
    "int equals one": (lambda m, p, e: causal(p).int() == 1, "causal"),
    "int is positive": (lambda m, p, e: causal(p).int() * 3 - 1 > 0, "causal"),
    "bool of int": (lambda m, p, e: causal(p).int().bool(), "causal"),
    "bool of one minus": (lambda m, p, e: (1 - (arange(KEYS) > p[:, None]).long()).bool(), "causal"),
    # Distances.
    "near": (lambda m, p, e: near(p), "window"),
    "nearer": (lambda m, p, e: (arange(KEYS)[None] - p[:, None]).abs() < WINDOW, "window"),
    "not far": (lambda m, p, e: ~((p[:, None] - arange(KEYS)).abs() > WINDOW), "window"),
    "at least near": (lambda m, p, e: (p[:, None] - arange(KEYS)).abs() <= WINDOW, "window"),
    # Either of two.
    "sink or window": (lambda m, p, e: causal(p) & ((arange(KEYS) < 4) | late(p)), "causal+alternative"),
    "sink or causal window": (lambda m, p, e: (causal(p) & late(p)) | (arange(KEYS) < 4), "causal+alternative"),
    "image or causal": (lambda m, p, e: causal(p) | (e % 7 == 0)[None], "alternative"),
    "global rows": (lambda m, p, e: near(p) | (p % 3 == 0)[:, None], "window"),
    "global rows and keys": (lambda m, p, e: causal(p) | (p % 3 == 0)[:, None] | (e < 9), "alternative"),
    "rows or keys": (lambda m, p, e: (p % 3 == 0)[:, None] | (e < 9), "alternative"),
    # Padding alone.
    "padding": (lambda m, p, e: (e > 20)[None, None, None], "lower bound"),
    "padding of each row": (lambda m, p, e: (e > 20).expand(1, 1, p.shape[0], KEYS), "lower bound"),
    "padding of rows and keys": (lambda m, p, e: (e.bool() & (p >= 0)[:, None])[None, None], "padding+rows"),
    "kept where not padded": (lambda m, p, e: causal(p) & ~(e == 5), "causal+padding"),
    # Views and copies.
    "narrow": (lambda m, p, e: causal(p).narrow(0, 0, p.shape[0]), "causal"),
    "narrow of keys": (lambda m, p, e: (arange(KEYS + 9) <= p[:, None]).narrow(1, 4, KEYS), "causal"),
    "repeat": (lambda m, p, e: causal(p)[None, None].repeat(1, 4, 1, 1), "causal"),
    "repeat of rows": (lambda m, p, e: (arange(KEYS) <= 90)[None].repeat(p.shape[0], 1), "causal"),
    "stack": (lambda m, p, e: torch.stack([causal(p)]), "causal"),
    "flatten": (lambda m, p, e: causal(p)[None, None].flatten(0, 1), "causal"),
    "expand as": (lambda m, p, e: (e > 20).expand_as(causal(p)) & causal(p), "lower bound+causal"),
    "index of no dimension": (lambda m, p, e: torch.stack([causal(p)])[torch.tensor(0)], "causal"),
    # Parts of masks.
    "prefix of keys": (
        lambda m, p, e: torch.cat([torch.ones(p.shape[0], 20, dtype=torch.bool), arange(180) <= p[:, None]], -1),
        None,
    ),
    "keys to come": (
        lambda m, p, e: torch.cat([arange(150) <= p[:, None], torch.zeros(p.shape[0], 50, dtype=torch.bool)], 1),
        None,
    ),
    "three parts": (
        lambda m, p, e: torch.cat([arange(50) <= p[:, None], (e < 9)[:90].expand(p.shape[0], 90), late(p)[:, :60]], 1),
        None,
    ),
    "a row for a class": (
        lambda m, p, e: torch.cat([(e[None] > 9)[:, :KEYS], (arange(KEYS) <= p[1:, None])]),
        None,
    ),
    "float parts": (
        lambda m, p, e: torch.cat([torch.zeros(p.shape[0], 20), where(arange(180) <= p[:, None], 0.0, NEG_INF)], -1),
        None,
    ),
    # Choices.
    "where with constants": (lambda m, p, e: where(causal(p), True, False), "causal"),
    "where with tensors": (
        lambda m, p, e: where(arange(KEYS) > p[:, None], torch.tensor(False), torch.tensor(True)),
        "causal",
    ),
    "where of rows": (lambda m, p, e: where((p % 3 == 0)[:, None], causal(p), near(p)), None),
    "filled": (lambda m, p, e: causal(p).masked_fill((e < 30)[None], True), None),
    "tensor constants": (lambda m, p, e: where(causal(p), torch.tensor([0.0]), torch.tensor([NEG_INF])), "causal"),
    # Float masks.
    "minimum": (lambda m, p, e: where(causal(p), 0.0, MIN), "causal"),
    "half of the minimum": (lambda m, p, e: where(causal(p), 0.0, 0.6 * MIN), "causal"),
    "one minus, times minimum": (lambda m, p, e: (1.0 - causal(p).float()) * MIN, "causal"),
    "hidden times minimum": (lambda m, p, e: (arange(KEYS) > p[:, None]).float() * MIN, "causal"),
    "filled with minimum": (
        lambda m, p, e: torch.zeros(p.shape[0], KEYS).masked_fill(arange(KEYS) > p[:, None], MIN),
        "causal",
    ),
    "minimum of two": (
        lambda m, p, e: where(causal(p), 0.0, MIN).masked_fill((e < 30)[None], MIN),
        "lower bound+causal",
    ),
    "triangle times condition": (
        lambda m, p, e: torch.full((p.shape[0], KEYS), MIN).triu(1) * (arange(KEYS) > p[:, None]),
        "causal",
    ),
    "padding of minima": (lambda m, p, e: ((1.0 - (e > 20).float()) * MIN)[None, None, None], "lower bound"),
    "windows of minima": (lambda m, p, e: where(near(p, 9), 0.0, MIN), "window"),
    "logarithm": (lambda m, p, e: causal(p).float().log(), "causal"),
}

TENSOR = {
    "indexed triangle with a bit flipped": lambda m, p, e: m.flipped[p % 400],
    "triangle that is written": lambda m, p, e: m.written[p % 400],
    "buffer of ones, which another method may write": lambda m, p, e: m.ones[p % 400],
    "buffer of zeros in a float mask": lambda m, p, e: m.zeros[p % 400],
    "float triangle of -1e9": lambda m, p, e: m.billion_tril[p % 400],
    "equals another mask": lambda m, p, e: causal(p) == (e < 90),
    "int equals two": lambda m, p, e: (causal(p).int() + (e < 90).int()) == 2,
    "differs from a position": lambda m, p, e: arange(KEYS) != p[:, None],
    "far": lambda m, p, e: (p[:, None] - arange(KEYS)).abs() > WINDOW,
    "near in uint8": lambda m, p, e: (p[:, None].to(torch.uint8) - arange(KEYS).to(torch.uint8)).abs() <= WINDOW,
    "near in int32": lambda m, p, e: (p[:, None].int() * 2**24 - (arange(KEYS) * 2**24).int()).abs() <= 2**28,
    "outside of a window": lambda m, p, e: (arange(KEYS) < p[:, None] - 9) | (arange(KEYS) > p[:, None]),
    "either of two numbers": lambda m, p, e: causal(p) | (e <= p[:, None]),
    "windows that overlap": lambda m, p, e: (
        near(p, 5) | ((arange(KEYS) >= p[:, None]) & (arange(KEYS) <= p[:, None] + WINDOW))
    ),
    "windows with a gap": lambda m, p, e: (
        near(p, 5) | ((arange(KEYS) >= p[:, None] + 7) & (arange(KEYS) <= p[:, None] + WINDOW))
    ),
    "exclusive or": lambda m, p, e: causal(p) ^ (e < 90),
    "input": lambda m, p, e: m.given.expand(p.shape[0], KEYS),
    "-1e9": lambda m, p, e: where(causal(p), 0.0, -1e9),
    "one minus, times -1e9": lambda m, p, e: (1.0 - causal(p).float()) * -1e9,
    "third of the minimum": lambda m, p, e: where(causal(p), 0.0, MIN / 3),
    "one minus integers, times minimum": lambda m, p, e: (1.0 - (e % 3).float()) * -abs(MIN) * causal(p) * 1e-30,
    "two minima": lambda m, p, e: where(causal(p), 0.0, MIN) + where(e > 20, 0.0, MIN),
    "minimum beside -inf": lambda m, p, e: where(causal(p), 0.0, MIN).masked_fill((e < 30)[None], NEG_INF),
    "bias where shown": lambda m, p, e: where(causal(p), 1.0, MIN),
    "columns in another order": lambda m, p, e: torch.cat([causal(p)[:, 100:] ^ (e < 50)[:100], causal(p)[:, :100]], 1),
}


class Masked(torch.nn.Module):
    """A module with one attention per mask."""

    def __init__(self, makes):
        super().__init__()
        self.makes = makes
        ones = torch.ones(400, KEYS, dtype=torch.bool)
        buffers = {
            "tril": ones.tril(),
            "above": ones.triu(1),
            "band": ones.tril(2) & ones.triu(-WINDOW),
            "float_tril": torch.full((400, KEYS), NEG_INF).triu(1),
            "min_tril": torch.full((400, KEYS), MIN).triu(1),
            "billion_tril": torch.full((400, KEYS), -1e9).triu(1),
            "flipped": ones.tril(),
            "ones": ones,
            "zeros": torch.zeros(400, KEYS),
            "written": ones.tril(),
            "given": arange(KEYS) % 3 > 0,
        }
        buffers["flipped"][77, 5] = False
        for i, (name, tensor) in enumerate(buffers.items()):
            self.register_buffer(name, tensor, persistent=bool(i % 2))
        self.attribute = ones.tril()

    def forward(self, q, k, v, pos, extra):
        outs = []
        for make in self.makes:
            mask = make(self, pos, extra)
            outs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True))
        # The write follows the use, so the next call sees another mask.
        self.written.copy_(self.written ^ (pos.sum() > 10**6))
        return outs


def position_sets(length: int):
    """Consecutive, permuted, repeated, negative and far positions, including rows that see nothing."""
    generator = torch.Generator().manual_seed(5)
    yield arange(length)
    yield arange(length) * 7 % KEYS
    yield torch.full((length,), 40)
    yield torch.randint(-90, 3 * KEYS, (length,), generator=generator)


class Rewritten:
    """A program with many masks, rewritten, and the results of both programs; all cases share one export."""

    def __init__(self, makes: dict, decompose: bool):
        rows = Dim("rows", min=17, max=300)
        length = 5 if decompose else 40
        args = (*qkv(length, KEYS, heads_kv=2), arange(length), torch.randperm(KEYS))
        shapes = None if decompose else ({2: rows}, None, None, {0: rows}, None)
        program = exported(Masked(list(makes.values())), args, shapes)
        if decompose:
            program = program.run_decompositions({})
        self.program, report = replace_sdpa(program)
        assert len(report.replaced) == len(makes)
        self.entries = dict(zip(makes, report.nodes, strict=True))
        self.nodes = dict(zip(makes, calls(self.program, "flashpte.sdpa_"), strict=True))
        self.results = {name: [] for name in makes}
        length = 5 if decompose else 77
        for seed, pos in enumerate(position_sets(length)):
            extra = torch.randperm(KEYS, generator=torch.Generator().manual_seed(seed))
            args = (*qkv(length, KEYS, heads_kv=2, seed=seed), pos, extra if seed else extra * 0)
            both = [fresh_module(p)(*args) for p in (program, self.program)]
            for name, expected, out in zip(makes, *both, strict=True):
                self.results[name].append((expected, out))
        assert check_maps(self.program, args) == len(makes)

    def check(self, name: str) -> None:
        for expected, out in self.results[name]:
            assert_same_attention(out, expected)


@pytest.fixture(scope="module", params=[False, True], ids=["exported", "decomposed"])
def proven(request):
    return Rewritten({name: make for name, (make, _) in PROVEN.items()}, request.param)


@pytest.fixture(scope="module", params=[False, True], ids=["exported", "decomposed"])
def mapped(request):
    return Rewritten(TENSOR, request.param)


@pytest.mark.parametrize("name", PROVEN)
def test_idioms_are_proven(name, proven):
    entry, node = proven.entries[name], proven.nodes[name]
    assert entry.mask_form == "positions", entry.mask_note
    assert PROVEN[name][1] in (entry.mask, None)
    assert node.args[3] is None
    assert node.args[9] is not None
    proven.check(name)


def test_proven_masks_are_not_computed(proven):
    assert not calls(proven.program, "tile_map")
    rows = proven.nodes["minimum"].args[0].meta["val"].shape[2]
    # If several numbers are compared, rows of only minima are searched for in what the bounds allow.
    found, looked_for = mask_tensors(proven.program, rows, KEYS), set(calls(proven.program, "any.dim"))
    while looked_for:
        node = looked_for.pop()
        found = [other for other in found if other is not node]
        looked_for |= {other for other in node.all_input_nodes if other in found}
    assert not found


@pytest.mark.parametrize("name", TENSOR)
def test_what_looks_alike_stays_a_tensor(name, mapped):
    entry, node = mapped.entries[name], mapped.nodes[name]
    assert entry.mask_form == "tensor"
    assert node.args[3] is not None
    assert node.args[9] is None
    mapped.check(name)
