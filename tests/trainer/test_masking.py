"""Masks: a function of (seed, epoch, example id) alone, with the distribution that the method asks for."""

import pytest
import torch

from dparallel.trainer.masking import (
    block_masks,
    complementary_masks,
    gather_positions,
    mixed_masks,
    random_masks,
    response_mask,
    uniform_draws,
)

RANDOM = {"seed": 1, "epoch": 0}


def responses(rows, length=100, prompt=7):
    return response_mask(torch.full((rows,), prompt), torch.ones(rows, length))


def test_draws_look_uniform_and_independent():
    draws = uniform_draws(3, 0, torch.arange(4000), 50).double()
    assert 0 <= draws.min() and draws.max() < 1
    assert torch.histc(draws, 20, 0, 1).sub(10_000).abs().max() < 600
    centred = draws - 0.5
    for shift in ((1, 0), (0, 1), (7, 3)):
        assert (centred * centred.roll(shift, (0, 1))).mean().abs() < 1e-3
    for other in (uniform_draws(4, 0, torch.arange(4000), 50), uniform_draws(3, 1, torch.arange(4000), 50)):
        assert (centred * (other - 0.5)).mean().abs() < 1e-3


def test_draws_are_those_of_splitmix64():
    """The same numbers by plain integers, so that no platform and no refactoring changes them."""

    def mix(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    for seed, epoch, example in ((0, 0, 0), (42, 3, 10**12), (7, -1, 5)):
        key = mix((seed + golden) % 2**64) + epoch
        key = mix((key + golden) % 2**64) + example
        expected = [(mix((mix(key % 2**64) + i * golden) % 2**64) >> 40) / 2**24 for i in (1, 2, 3)]
        assert uniform_draws(seed, epoch, torch.tensor([example]), 3)[0].tolist() == pytest.approx(expected)


BLOCKS_OF_32 = [
    lambda r, **k: block_masks(r, 32, **k),
    lambda r, **k: mixed_masks(r, 32, **k),
]


@pytest.mark.parametrize("masks_of", [random_masks, *BLOCKS_OF_32])
def test_masks_depend_on_the_example_alone(masks_of):
    """Alone, in another batch, in another order, behind more padding: the same masks."""
    lengths = torch.tensor([60, 100, 81, 100])
    attention = (torch.arange(100) < lengths[:, None]).long()
    prompt, ids = torch.tensor([5, 9, 0, 40]), torch.tensor([3, 11, 7, 2])
    batch = masks_of(response_mask(prompt, attention), example_id=ids, **RANDOM)
    for i in range(4):
        alone = masks_of(
            response_mask(prompt[i : i + 1], attention[i : i + 1, : lengths[i]]), example_id=ids[i : i + 1], **RANDOM
        )
        for together, single in zip(batch, alone, strict=True):
            row = together[i, : lengths[i]] if together.ndim == 2 else together[i]
            assert torch.equal(row, single[0])
    assert not torch.equal(
        masks_of(response_mask(prompt, attention), example_id=ids, seed=1, epoch=1).hidden, batch.hidden
    )
    assert not torch.equal(
        masks_of(response_mask(prompt, attention), example_id=ids, seed=2, epoch=0).hidden, batch.hidden
    )
    assert not (batch.hidden & ~response_mask(prompt, attention)).any()
    assert not (batch.scored & ~batch.hidden).any()


def test_random_masks_follow_their_ratio():
    response = responses(4000)
    masks = random_masks(response, example_id=torch.arange(4000), **RANDOM)
    assert torch.equal(masks.hidden, masks.scored) and (masks.span_length == 93).all()
    share = masks.hidden.sum(dim=1) / 93
    assert (share - masks.ratio).abs().mean() < 0.05
    assert masks.ratio.mean() == pytest.approx(0.5, abs=0.02) and masks.ratio.min() >= 1e-3
    by_position = masks.hidden.float().mean(dim=0)[7:]
    assert (by_position - 0.5).abs().max() < 0.04


def test_block_masks_show_before_and_hide_behind():
    response = responses(6000, length=77, prompt=7)  # 70 tokens: blocks of 32, 32 and 6
    masks = block_masks(response, 32, example_id=torch.arange(6000), **RANDOM)
    counts = {32: 0, 6: 0}
    blocks = torch.zeros(3)
    for row in range(6000):
        hidden = masks.hidden[row, 7:]
        behind = (hidden & ~masks.scored[row, 7:]).nonzero().flatten().tolist()
        block = 2 if not behind else behind[0] // 32 - 1
        start, stop = 32 * block, min(32 * block + 32, 70)
        assert behind == list(range(stop, 70))
        assert not masks.hidden[row, 7 : 7 + start].any()
        assert masks.span_length[row] == stop - start
        counts[stop - start] += 1
        blocks[block] += 1
    assert (blocks / 6000 - 1 / 3).abs().max() < 0.03
    in_block = masks.scored.sum(dim=1) / masks.span_length
    assert (in_block - masks.ratio).abs().mean() < 0.1


def test_mixed_masks_are_half_and_half():
    response, ids = responses(4000), torch.arange(4000)
    mixed = mixed_masks(response, 32, example_id=ids, **RANDOM)
    block, plain = (
        block_masks(response, 32, example_id=ids, **RANDOM),
        random_masks(response, example_id=ids, **RANDOM),
    )
    is_block = (mixed.hidden == block.hidden).all(dim=1)
    assert ((mixed.hidden == plain.hidden).all(dim=1) | is_block).all()
    assert is_block.float().mean() == pytest.approx(0.5, abs=0.03)


def test_first_position_is_not_learned_by_a_shifted_family():
    response = response_mask(torch.tensor([0, 3]), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]), logits_shift=1)
    assert response.tolist() == [[False, True, True, True, True], [False, False, False, True, False]]


@pytest.mark.parametrize("multiple", [8, 32])
def test_gather_positions(multiple):
    masked = torch.rand(50, 37, generator=torch.Generator().manual_seed(0)) < torch.rand(50, 1)
    masked[3] = False
    positions, is_real = gather_positions(masked, multiple)
    assert positions.shape[1] == min(-(-int(masked.sum(dim=1).max()) // multiple) * multiple, 37)
    for row in range(50):
        assert positions[row][is_real[row]].tolist() == masked[row].nonzero().flatten().tolist()


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("block_length", [32, None])
def test_two_views_score_every_token_of_the_span_once(block_length, ordered):
    response = responses(3000, length=77, prompt=7)  # 70 tokens: blocks of 32, 32 and 6
    steps = torch.rand(3000, 77).argsort(dim=1) if ordered else None
    masks = complementary_masks(response, block_length, unmasking_step=steps, example_id=torch.arange(3000), **RANDOM)
    (first, second), (hidden, hidden_too) = masks.scored.chunk(2), masks.hidden.chunk(2)
    assert not (first & second).any()
    span = first | second
    starts = span[:, 7:].int().argmax(dim=1)
    lengths = span.sum(dim=1)
    if block_length is None:
        assert torch.equal(span, response)
    else:
        assert set(zip(starts.tolist(), lengths.tolist(), strict=True)) == {(0, 32), (32, 32), (64, 6)}
        assert (torch.bincount(starts // 32) / 3000 - 1 / 3).abs().max() < 0.03
    position = torch.arange(77)
    behind = response & (position >= (7 + starts + lengths)[:, None])
    assert torch.equal(hidden, first | behind)
    assert torch.equal(hidden_too, (span if ordered else second) | behind)
    assert torch.equal(masks.span_length, lengths.repeat(2))
    share = first.sum(dim=1) / lengths
    assert share.mean() == pytest.approx(0.5, abs=0.01)
    if ordered:  # the teacher wrote what is hidden after all that is shown
        shown, late = (span & ~first), first
        assert (steps.masked_fill(~shown, -1).amax(dim=1) < steps.masked_fill(~late, 99).amin(dim=1)).all()


def test_views_of_a_range_of_ratios():
    response = responses(4000)
    masks = complementary_masks(response, None, (0.2, 0.8), example_id=torch.arange(4000), **RANDOM)
    first, second = masks.ratio.chunk(2)
    assert 0.2 <= first.min() and first.max() <= 0.8 and first.mean() == pytest.approx(0.5, abs=0.02)
    torch.testing.assert_close(first + second, torch.ones(4000))
    assert (masks.scored.sum(dim=1) / 93 - masks.ratio).abs().mean() < 0.05


def test_tokens_that_the_teacher_never_wrote_come_last():
    response = torch.ones(1, 6, dtype=torch.bool)
    steps = torch.tensor([[3, 0, -1, -1, 1, 2]])
    masks = complementary_masks(response, None, unmasking_step=steps, example_id=torch.tensor([0]), **RANDOM)
    assert masks.scored[0].tolist() == [True, False, True, True, False, False]


def test_a_response_of_whole_blocks_never_draws_an_empty_one():
    """The published code draws one block too many, which then trains nothing."""
    masks = complementary_masks(responses(2000, length=71, prompt=7), 32, example_id=torch.arange(2000), **RANDOM)
    assert (masks.span_length == 32).all()
