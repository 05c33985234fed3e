"""Masks over the caches, compared with a plain model of the position in each slot."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from flashpte.export.common.errors import ExportError
from flashpte.export.models.attention_interface import attend
from flashpte.export.state.kv_cache import FULL, SLIDING, attention_state
from flashpte.export.state.model_state import ModelState

WINDOW = 3
MAX_SEQ_LEN = 32


def expected_mask(slots, positions, window):
    """Row by row: a slot is attended if it holds a position in the row's window."""
    return torch.tensor([[p is not None and 0 <= row - p < window for p in slots] for row in positions])


class SlotModel:
    """Records the position last written to each slot."""

    def __init__(self, size):
        self.slots = [None] * size

    def write(self, positions):
        for p in positions:
            self.slots[p % len(self.slots)] = p


def cache(window=WINDOW, max_seq_len=MAX_SEQ_LEN):
    return ModelState(
        [attention_state(1, 4, window), attention_state(2, 8, None)], max_seq_len=max_seq_len, dtype=torch.float32
    )


@pytest.mark.parametrize("chunks", list(itertools.product([1, 2, 3], repeat=4)), ids=str)
def test_ring_mask_follows_what_the_slots_hold(chunks):
    kv, model, position = cache(), SlotModel(2 * WINDOW), 0
    for chunk in itertools.islice(itertools.cycle(chunks), 8):
        positions = list(range(position, position + chunk))
        model.write(positions)
        mask = kv.masks(torch.tensor(positions))[SLIDING]
        assert mask.shape == (1, 1, chunk, 2 * WINDOW)
        assert torch.equal(mask[0, 0], expected_mask(model.slots, positions, WINDOW))
        assert mask.any(-1).all()
        position += chunk


@pytest.mark.parametrize("back", [1, 2, 3])
@pytest.mark.parametrize("written", range(4, 20))
def test_ring_mask_after_moving_back_by_at_most_the_window(written, back):
    """Slots of rejected tokens hold positions that no row may see; no slot that a row needs was overwritten."""
    kv, model = cache(), SlotModel(2 * WINDOW)
    model.write(range(written))
    for position in range(written - back, written + 4):
        model.write([position])
        visible = [None if p is None or p > position else p for p in model.slots]
        got = kv.masks(torch.tensor([position]))[SLIDING][0, 0]
        assert torch.equal(got, expected_mask(visible, [position], WINDOW))
        assert got.sum() == min(WINDOW, position + 1)


def test_full_mask_is_causal_over_every_slot():
    mask = cache().masks(torch.tensor([4, 5]))[FULL]
    assert mask.dtype == torch.bool
    assert mask.shape == (1, 1, 2, MAX_SEQ_LEN)
    assert mask.sum(-1).tolist() == [[[5, 6]]]


def test_ring_is_not_longer_than_the_sequence():
    kv = cache(window=20)
    assert kv.get_buffer("k_0").shape == (1, 1, MAX_SEQ_LEN, 4)
    mask = kv.masks(torch.tensor([30, 31]))[SLIDING][0, 0]
    assert torch.equal(mask, expected_mask(list(range(MAX_SEQ_LEN)), [30, 31], 20))


def test_update_writes_rings_modulo_their_size_and_full_layers_in_place():
    kv = cache()
    positions = torch.tensor([5, 6, 7])
    view = kv.view(positions)
    ring_keys, ring_values = view.update(torch.ones(1, 1, 3, 4), 2 * torch.ones(1, 1, 3, 4), 0)
    assert ring_keys[0, 0, :, 0].tolist() == [1, 1, 0, 0, 0, 1]
    assert ring_values[0, 0, :, 0].tolist() == [2, 2, 0, 0, 0, 2]
    assert ring_keys is kv.get_buffer("k_0")
    keys, _ = view.update(torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 8), 1)
    assert keys[0, 0, :, 0].nonzero().flatten().tolist() == [5, 6, 7]
    assert int(view.get_seq_length()) == 5


def test_cache_buffers_are_not_part_of_a_checkpoint():
    assert not cache().state_dict()


def test_two_windows_are_refused():
    with pytest.raises(ExportError, match=r"\[4, 8\]"):
        ModelState([attention_state(1, 4, 4), attention_state(1, 4, 8)], 32, torch.float32)


def test_attend_is_masked_grouped_attention():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 6, 2, 8, generator=generator)
    k, v = torch.randn(2, 1, 2, 5, 8, generator=generator)
    mask = torch.tensor([[[[True, False, True, False, True], [False, True, True, True, False]]]])
    got, weights = attend(torch.nn.Identity(), q, k, v, mask, scaling=0.7)
    scores = q @ k.repeat_interleave(3, 1).mT * 0.7
    expected = F.softmax(scores.masked_fill(~mask, float("-inf")), -1) @ v.repeat_interleave(3, 1)
    assert weights is None
    torch.testing.assert_close(got, expected.transpose(1, 2))


@pytest.mark.parametrize(("mask", "dropout"), [(None, 0.0), (torch.ones(1, 1, 1, 1, dtype=torch.bool), 0.1)])
def test_attend_refuses_what_it_does_not_do(mask, dropout):
    q = torch.zeros(1, 1, 1, 8)
    with pytest.raises(ExportError, match="mask"):
        attend(torch.nn.Identity(), q, q, q, mask, dropout=dropout)
