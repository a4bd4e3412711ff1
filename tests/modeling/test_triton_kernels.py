"""The kernels against the plain functions that stand beside them: on a GPU, or, by conftest.py, in Triton's
interpreter."""

import sys
import types

import numpy as np
import pytest
import torch

from dparallel.modeling import TokenStatistics, layers, modeling_llada, token_statistics, triton_kernels
from dparallel.modeling.block_cache import BlockCache
from dparallel.modeling.canvas import Canvas, Layout, Plan

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MASK = 3
NARROW = torch.bfloat16 if torch.cuda.is_available() else torch.float16  # the interpreter cannot multiply bfloat16


@pytest.fixture(autouse=True)
def plain_functions_are_plain(monkeypatch):
    for name in ("layers", "token_statistics", "canvas"):
        module = sys.modules[f"dparallel.modeling.{name}"]
        monkeypatch.setattr(module, "suit_kernels", lambda *tensors: False)


def random(*shape, seed=0, scale=1.0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE, dtype)


def assert_close(found, expected):
    """Equal up to float32 rounding, or, in narrow dtypes, to the last place."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    resolution = 1e-6 if found.dtype == torch.float32 else torch.finfo(found.dtype).eps
    torch.testing.assert_close(found, expected, atol=2 * resolution, rtol=2 * resolution)


def check_statistics(logits):
    expected = token_statistics(logits, MASK)
    found = triton_kernels.fused_token_statistics(logits, MASK)
    assert torch.equal(found[0], expected.token)
    for values, wanted in zip(found[1:], expected[1:4], strict=True):
        torch.testing.assert_close(values, wanted, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [4, 5, 100, 1024, 1025, 9001])
def test_statistics(vocab_size, dtype):
    check_statistics(random(2, 3, vocab_size, scale=4, dtype=dtype))
    check_statistics(random(2, 7, vocab_size, scale=0.1, dtype=dtype)[:, 2:5])  # rows at a distance
    check_statistics(random(3, vocab_size, 4, dtype=dtype).transpose(1, 2))


@pytest.mark.parametrize("vocab_size", [6, 5000])
def test_statistics_of_odd_logits(vocab_size):
    """All equal, huge, hugely negative, alone among -inf, tied, and [MASK] the likeliest."""
    logits = torch.zeros(1, 8, vocab_size, device=DEVICE)
    logits[0, 1, 2] = 1e4
    logits[0, 2] = -torch.inf
    logits[0, 2, 4] = 0.0
    logits[0, 3] = 3e38
    logits[0, 4] = -3e38
    logits[0, 5, [MASK, 4]] = torch.tensor([9.0, 8.0], device=DEVICE)
    logits[0, 6, [2, vocab_size - 1]] = 5.0
    logits[0, 7] = -torch.inf
    logits[0, 7, [MASK, vocab_size - 1]] = 1.0
    check_statistics(logits)
    check_statistics(logits.bfloat16())


@pytest.mark.gpu
def test_statistics_at_full_size():
    for batch_size in (1, 32):
        check_statistics(random(batch_size, 32, 126464, scale=3, dtype=torch.bfloat16))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [48, 64, 4096])
def test_norm(size, dtype):
    norm = layers.RMSNorm(size, 1e-5).to(DEVICE, dtype)
    norm.weight.copy_(random(size, seed=1))
    x, residual = random(2, 5, size, dtype=dtype), random(2, 5, size, seed=2, dtype=dtype)
    assert_close(triton_kernels.fused_rms_norm(x, norm.weight, 1e-5), norm(x))
    found = triton_kernels.fused_rms_norm(x, norm.weight, 1e-5, residual)
    for part, expected in zip(found, norm(x, residual), strict=True):
        assert_close(part, expected)


def heads_and_tables(query_heads, key_heads, size, dtype, rows):
    packed = random(2, 7, (query_heads + 2 * key_heads) * size, dtype=dtype)  # rows of another length than theirs
    heads = packed.unflatten(-1, (-1, size)).transpose(1, 2)
    positions = torch.randint(0, 500, (rows, 7), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    tables = modeling_llada.rotary_tables(positions, size, 5e5)
    return *heads.split((query_heads, key_heads, key_heads), dim=1), (tables.cos, tables.sin)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("query_heads", "key_heads", "size"), [(3, 3, 16), (12, 2, 64)])
def test_rotary_embedding(query_heads, key_heads, size, dtype, rows):
    query, key, _, tables = heads_and_tables(query_heads, key_heads, size, dtype, rows)
    found = triton_kernels.fused_rotate(query, key, *tables)
    for rotated, expected in zip(found, layers.rotate(query, key, *tables), strict=True):
        assert_close(rotated, expected)


@pytest.mark.parametrize("rows", [None, [3, 1]])
@pytest.mark.parametrize("columns", [None, [[8, 2, 5, 3, 11, 0, 1], [0, 1, 2, 3, 4, 5, 10]]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("query_heads", "key_heads", "size"), [(3, 3, 16), (20, 10, 32)])
def test_rotated_keys_and_values_find_their_places(query_heads, key_heads, size, dtype, columns, rows):
    """In the cache, by the kernel as by `BlockCache.update`."""
    query, key, value, tables = heads_and_tables(query_heads, key_heads, size, dtype, 2)
    kept = [random(4, key_heads, 12, size, seed=seed, dtype=dtype) for seed in (2, 3)]
    cache = BlockCache(4, 12)
    cache.keys, cache.values = [kept[0].clone()], [kept[1].clone()]
    rotated, rotated_key = layers.rotate(query, key, *tables)
    rows, columns = (None if each is None else torch.tensor(each, device=DEVICE) for each in (rows, columns))
    cache.place(slice(2) if rows is None else rows, columns, 7 if columns is None else 12)
    cache.update(rotated_key, value, 0)
    assert_close(triton_kernels.fused_rotate(query, key, *tables, value, kept, rows, columns), rotated)
    for found, expected in zip(kept, cache.of_layer(0, key), strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [100, 4096])
def test_gated_activation(size, dtype):
    gate, up = random(2, 5, 2 * size, scale=3, dtype=dtype).split(size, dim=-1)
    assert_close(triton_kernels.fused_silu_product(gate, up), layers.silu_product(gate, up))


@pytest.mark.parametrize("with_mask", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize(("batch_size", "queries", "seen"), [(1, 64, 700), (2, 3, 130), (40, 17, 64)])
@pytest.mark.parametrize(("heads", "groups", "size"), [(2, 2, 16), (4, 2, 64)])
def test_attention(batch_size, queries, seen, heads, groups, size, with_mask):
    states = [
        random(batch_size, length, count, size, seed=seed, dtype=NARROW).transpose(1, 2)
        for seed, (length, count) in enumerate(((queries, heads), (seen + 5, groups), (seen + 5, groups)))
    ]
    query, key, value = states[0], states[1][:, :, :seen], states[2][:, :, :seen]
    mask = None
    if with_mask:  # of a row, whole parts of its keys
        hidden = torch.arange(seen, device=DEVICE) < torch.arange(batch_size, device=DEVICE)[:, None] * 60 % seen
        mask = torch.where(hidden, torch.finfo(NARROW).min, 0.0).to(NARROW)[:, None, None]
        mask = mask.expand(-1, -1, queries, -1)
    found = triton_kernels.fused_attention(query, key, value, mask, size**-0.5)
    # The same keys and values in other rows of a cache.
    rows = torch.randperm(batch_size + 2, generator=torch.Generator().manual_seed(0))[:batch_size].to(DEVICE)
    kept = [each.new_zeros(batch_size + 2, *each.shape[1:]).index_copy_(0, rows, each) for each in (key, value)]
    assert torch.equal(triton_kernels.fused_attention(query, *kept, mask, size**-0.5, rows), found)
    query, key, value = (each.float() for each in (query, key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, None if mask is None else mask.float(), enable_gqa=True
    )
    torch.testing.assert_close(found.float(), expected.transpose(1, 2), atol=5e-3, rtol=1e-2)


def test_only_masks_that_are_alike_for_all_queries_go_to_the_kernel(monkeypatch):
    called = []
    monkeypatch.setattr(layers, "suit_kernels", lambda *tensors: True)
    monkeypatch.setattr(layers, "fused_attention", lambda *arguments: called.append("kernel"))
    config = types.SimpleNamespace(_attn_implementation="sdpa")
    module = types.SimpleNamespace(config=config, num_key_value_groups=1, is_causal=False)
    states = [random(2, 4, 3, 16, dtype=torch.bfloat16).transpose(1, 2)] * 3

    def runs_kernel(mask):
        called.clear()
        layers.attend(module, *states, mask, 0.25)
        return bool(called)

    one = torch.zeros(2, 1, 1, 4, dtype=torch.bfloat16, device=DEVICE)
    assert runs_kernel(None) and runs_kernel(one.expand(-1, -1, 4, -1))
    assert not runs_kernel(one.repeat(1, 1, 4, 1))
    assert not runs_kernel(one.repeat(1, 3, 1, 1).expand(-1, -1, 4, -1))
    config._attn_implementation = "eager"
    assert not runs_kernel(None)


@pytest.mark.parametrize("eos", [(), (5,), (5, 6)])
@pytest.mark.parametrize("block_length", [4, 7])
def test_writing_to_a_canvas(eos, block_length):
    """Rows at different places, some of which see less than their block, with tokens that end rows now and then, and a
    step that is filled up with rows that have no place."""
    generator = torch.Generator().manual_seed(0)
    layout = Layout(12, 32, False, MASK, eos, None, torch.device(DEVICE))
    plain, fused = Canvas(layout), Canvas(layout)
    lengths = torch.randint(1, 12, (12,), generator=generator).tolist()
    for canvas in (plain, fused):
        canvas.load(list(range(12)), [torch.full((length,), 9) for length in lengths])
    starts, ended = np.array(lengths), 0
    for number in range(4 * block_length):
        slots = np.flatnonzero(np.random.default_rng(number).random(12) < 0.8)
        start = starts[slots]
        stop = np.minimum(start + np.where(slots % 3, block_length, block_length - 1), 32)
        seen = np.minimum(starts[slots] + np.where(slots % 4, 99, 2), 32)
        nothing = np.zeros_like(slots)
        plan = Plan(slots, nothing, start, stop, seen, nothing, nothing, nothing + number)
        rows, shape = len(slots) + number % 3, (len(slots) + number % 3, block_length)
        token = torch.randint(4, 20, shape, generator=generator).to(DEVICE)
        statistics = TokenStatistics(token, torch.rand(shape, generator=generator).to(DEVICE), None, None)
        chosen = (torch.rand(shape, generator=generator) < 0.4).to(DEVICE)
        for canvas in (plain, fused):
            canvas.send(plan, rows)
            sent = Plan(*canvas.plan(rows))
            _, masked = canvas.block_columns(sent, block_length)
            if canvas is plain:
                canvas.write(sent, masked, statistics, chosen & masked)
            else:
                triton_kernels.fused_write(canvas, sent, statistics, chosen & masked)
        reports = [canvas.look(rows, len(slots)) for canvas in (plain, fused)]
        for one, other in zip(*reports, strict=True):
            assert (one == other).all()
        for name in ("ids", "unmasking_step", "unmasking_confidence"):
            assert torch.equal(getattr(fused, name)[:12, :32], getattr(plain, name)[:12, :32]), name
        report = reports[0]
        ended += (report.end > 0).sum()
        is_done = (report.decided >= np.minimum(stop, seen)) & (stop < 32)
        starts[slots[is_done]] = stop[is_done]
    assert (ended > 0) == bool(eos)


def test_where_kernels_are_used():
    suit = triton_kernels.suit_kernels
    x = torch.zeros(2, 3, device=DEVICE)
    assert not suit(x), "gradients are recorded"
    with torch.no_grad():
        assert suit(x) == torch.cuda.is_available()
        assert not suit(x, x.bfloat16()) and not suit(x.double()) and not suit(x.cpu())
