"""The kernels against the plain functions that stand beside them: on a GPU, or, by conftest.py, in Triton's
interpreter."""

import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from dparallel.modeling import TokenStatistics, layers, modeling_llada, token_statistics, triton_kernels
from dparallel.modeling.canvas import Canvas, Layout, Plan, Shape

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


def tokens_of(slots, firsts, sizes, seen, spare=0, blocks=None):
    """A canvas of twelve slots and 400 columns, and the tokens of a pass over these columns of these slots, `spare`
    more rows and tokens than there are."""
    layout = Layout(12, 400, True, MASK, (), None, blocks, torch.device(DEVICE))
    canvas = Canvas(layout)
    slots, firsts, sizes, seen = (np.array(each) for each in (slots, firsts, sizes, seen))
    nothing = np.zeros_like(slots)
    plan = Plan(slots, nothing, nothing, seen, nothing, nothing, nothing, firsts, sizes, np.cumsum(sizes) - sizes)
    shape = Shape(len(slots) + spare, int(seen.max()), 1, int(sizes.sum()) + spare, int(sizes.max()))
    canvas.send(plan, shape)
    return canvas, canvas.tokens(canvas.plan(shape.rows), shape)


def kept_and_queries(canvas, tokens, heads, groups, size, dtype):
    kept = [random(13, 401, groups, size, seed=seed, dtype=dtype).transpose(1, 2) for seed in (2, 3)]
    canvas.cache.keys, canvas.cache.values = ([each.clone()] for each in kept)
    packed = random(1, len(tokens.slot), (heads + 2 * groups) * size, dtype=dtype)  # not contiguous
    return kept, packed.unflatten(-1, (-1, size)).transpose(1, 2).split((heads, groups, groups), dim=1)


def attention_module(implementation, size):
    """What attention looks at of a layer whose queries have two heads for each of the keys."""
    config = types.SimpleNamespace(_attn_implementation=implementation)
    return types.SimpleNamespace(
        config=config, layer_idx=0, head_dim=size, num_key_value_groups=2, is_causal=False, training=False
    )


@pytest.mark.parametrize("spare", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "groups", "size"), [(3, 3, 16), (20, 10, 32)])
def test_rotated_keys_and_values_find_their_places(heads, groups, size, dtype, spare):
    """In the cache, by the kernel as by `Tokens.keep`."""
    canvas, tokens = tokens_of([3, 1, 7], [4, 0, 300], [3, 9, 2], [7, 9, 400], spare)
    kept, (query, key, value) = kept_and_queries(canvas, tokens, heads, groups, size, dtype)
    tables = modeling_llada.rotary_tables(tokens.column[None], size, 5e5)
    rotated, rotated_key = layers.rotate(query, key, tables.cos, tables.sin)
    tokens.keep(canvas.cache.of_layer(0, key), (rotated_key, value))
    assert_close(triton_kernels.fused_rotate(query, key, tables.cos, tables.sin, value, kept, tokens), rotated)
    for found, expected in zip(kept, canvas.cache.of_layer(0, key), strict=True):
        assert_close(found[:12, :, :400], expected[:12, :, :400])  # what has no place is in any order


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [100, 4096])
def test_gated_activation(size, dtype):
    gate, up = random(2, 5, 2 * size, scale=3, dtype=dtype).split(size, dim=-1)
    assert_close(triton_kernels.fused_silu_product(gate, up), layers.silu_product(gate, up))


PASSES = {
    "a_block": ([5], [300], [32], [390], 0),
    "blocks_of_many_rows": ([*range(12)], [64] * 12, [5] * 12, [96, 130, *range(70, 80)], 0),
    "blocks_and_whole_rows": ([3, 1, 7, 0], [70, 0, 33, 0], [17, 140, 33, 5], [90, 140, 200, 5], 3),
}


@pytest.mark.parametrize("blocks", [None, 4, 24])
@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize(("heads", "groups", "size"), [(2, 2, 16), (4, 2, 64)])
def test_attention(name, heads, groups, size, blocks):
    """Each token against what its own row, and in a block-causal model its own block, sees."""
    canvas, tokens = tokens_of(*PASSES[name], blocks=blocks)
    (keys, values), (query, _, _) = kept_and_queries(canvas, tokens, heads, groups, size, NARROW)
    found = triton_kernels.fused_attention(query, keys, values, tokens, size**-0.5)[0]
    slots, columns, sizes, seen, _ = PASSES[name]
    firsts = np.cumsum(sizes) - sizes
    for slot, column, first, count, limit in zip(slots, columns, firsts, sizes, seen, strict=True):
        states = query[0, :, first : first + count], keys[slot, :, :limit], values[slot, :, :limit]
        own = column + torch.arange(count, device=DEVICE)
        stop = torch.full_like(own, limit) if blocks is None else (own // blocks + 1) * blocks
        expected = torch.nn.functional.scaled_dot_product_attention(
            *(each.float()[None] for each in states),
            attn_mask=torch.arange(limit, device=DEVICE) < stop[:, None],
            enable_gqa=True,
        )[0].transpose(0, 1)
        torch.testing.assert_close(found[first : first + count].float(), expected, atol=5e-3, rtol=1e-2)


@pytest.mark.parametrize("blocks", [None, 4])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_without_the_kernel(implementation, blocks):
    """Both put keys and values into the cache, and attend to them."""
    passes = ([3, 1, 7, 0], [70, 0, 33, 0], [7, 30, 3, 5], [90, 40, 130, 5], 3)
    canvas, tokens = tokens_of(*passes, blocks=blocks)
    kept, (query, key, value) = kept_and_queries(canvas, tokens, 4, 2, 16, torch.float32)
    tables = modeling_llada.rotary_tables(tokens.column[None], 16, 5e5)
    module = attention_module(implementation, 16)
    found = layers.cached_attention(module, query, key, value, tables, canvas.cache.place(tokens))
    rotated = triton_kernels.fused_rotate(query, key, tables.cos, tables.sin, value, kept, tokens)
    expected = triton_kernels.fused_attention(rotated, *kept, tokens, 0.25)
    count = sum(passes[2])
    torch.testing.assert_close(found[:, :count], expected[:, :count], atol=2e-5, rtol=1e-5)


def test_which_attention_goes_to_the_kernel(monkeypatch):
    called = []
    monkeypatch.setattr(layers, "suit_kernels", lambda *tensors: True)
    monkeypatch.setattr(layers, "fused_attention", lambda query, *others: called.append(1) or query.transpose(1, 2))
    canvas, tokens = tokens_of(*PASSES["a_block"])

    def runs_kernel(implementation, dtype, size):
        called.clear()
        _, (query, key, value) = kept_and_queries(canvas, tokens, 4, 2, size, dtype)
        module = attention_module(implementation, size)
        tables = modeling_llada.rotary_tables(tokens.column[None], size, 5e5)
        canvas.cache.keys, canvas.cache.values = [], []
        layers.cached_attention(module, query, key, value, tables, canvas.cache.place(tokens))
        return bool(called)

    assert runs_kernel("block_sdpa", NARROW, 16)
    assert not runs_kernel("sdpa", NARROW, 16)
    assert not runs_kernel("eager", NARROW, 16)
    assert not runs_kernel("block_sdpa", torch.float32, 16)
    monkeypatch.setattr(layers, "suit_kernels", lambda *tensors: False)
    assert not runs_kernel("block_sdpa", NARROW, 16)


@pytest.mark.parametrize("eos", [(), (5,), (5, 6)])
@pytest.mark.parametrize("block_length", [4, 7])
def test_writing_to_a_canvas(eos, block_length):
    """Rows at different places, some of which see less than their block, with tokens that end rows now and then, and a
    step that is filled up with rows that have no place."""
    generator = torch.Generator().manual_seed(0)
    layout = Layout(12, 32, False, MASK, eos, None, None, torch.device(DEVICE))
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
        plan = Plan(slots, start, stop, seen, nothing, nothing, nothing + number, nothing, nothing, nothing)
        rows, shape = len(slots) + number % 3, (len(slots) + number % 3, block_length)
        token = torch.randint(4, 20, shape, generator=generator).to(DEVICE)
        statistics = TokenStatistics(token, torch.rand(shape, generator=generator).to(DEVICE), None, None)
        chosen = (torch.rand(shape, generator=generator) < 0.4).to(DEVICE)
        for canvas in (plain, fused):
            canvas.send(plan, Shape(rows, 32, block_length, 0, 0))
            sent = canvas.plan(rows)
            _, masked = canvas.block_columns(sent, block_length)
            if canvas is plain:
                canvas.write(sent, masked, statistics, chosen & masked)
            else:
                triton_kernels.fused_write(canvas, sent, statistics, chosen & masked, masked)
        reports = [canvas.look(rows, len(slots)) for canvas in (plain, fused)]
        for one, other in zip(*reports, strict=True):
            assert (one == other).all()
        for name in ("ids", "unmasking_step", "unmasking_confidence"):
            assert torch.equal(getattr(fused, name)[:12, :32], getattr(plain, name)[:12, :32]), name
        assert torch.equal(fused.plan(rows).number, plain.plan(rows).number)
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


def test_a_kernel_that_fails_gives_way_to_plain_pytorch(monkeypatch, caplog):
    """For good, with one warning; what the others do is their matter. There may be no compiler, or a GPU too small."""

    def fused_rms_norm(*arguments):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(layers, "suit_kernels", lambda *tensors: True)
    monkeypatch.setattr(layers, "fused_rms_norm", fused_rms_norm)
    monkeypatch.setattr(triton_kernels, "failed", set())
    norm, x = layers.RMSNorm(48, 1e-5).to(DEVICE), random(2, 5, 48)
    with torch.no_grad(), caplog.at_level("WARNING"):
        for _ in range(2):
            assert torch.equal(norm(x), layers.rms_norm(x, norm.weight, 1e-5))
    assert caplog.text.count("The kernel fused_rms_norm failed, and plain PyTorch takes its place: out of") == 1
    assert triton_kernels.failed == {fused_rms_norm}


@pytest.mark.journey
def test_one_switch_turns_kernels_off(monkeypatch):
    code = "from dparallel.modeling.triton_kernels import IS_ENABLED; print(IS_ENABLED)"
    environment = {**os.environ, "DPARALLEL_KERNELS": "0"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr
    if torch.cuda.is_available():
        with torch.no_grad():
            assert triton_kernels.suit_kernels(torch.zeros(2, device=DEVICE))
            monkeypatch.setattr(triton_kernels, "IS_ENABLED", False)
            assert not triton_kernels.suit_kernels(torch.zeros(2, device=DEVICE))


@pytest.mark.gpu
def test_no_kernel_fails_here(family):
    model = family.load().to("cuda", torch.bfloat16)
    for cache in ("none", "prefix", "dual"):
        model.generate(torch.tensor([[5, 6]], device="cuda"), max_new_tokens=40, block_cache=cache)
    assert not triton_kernels.failed
