# SPDX-License-Identifier: Apache-2.0; dparallel 0.2.0
"""What is between the matrix products of a step, each in one kernel: CUDA only, and without gradients.

Each function has a plain twin where it is called, with the same rounding. `suit_kernels` says which one it is to be,
and `kernel_or_plain` calls it, or the twin where a kernel does not work. With `DPARALLEL_KERNELS=0` in the
environment, no kernel of this file is used.
"""

import os
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from transformers.utils import logging

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch without CUDA
    triton, tl = None, SimpleNamespace(constexpr=None)

logger = logging.get_logger(__name__)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
IS_ENABLED = os.environ.get("DPARALLEL_KERNELS", "1") != "0"
failed: set[Callable] = set()  # functions of this file that do not work on this machine
HEAD_DIMS = (16, 32, 64, 128)  # of `fused_rotate` and `fused_attention`


def suit_kernels(*tensors: torch.Tensor) -> bool:
    """Do these tensors suit the kernels?"""
    first = tensors[0]
    return (
        first.is_cuda
        and first.device.index == torch.cuda.current_device()  # where Triton launches
        and first.dtype in DTYPES
        and all(tensor.dtype == first.dtype for tensor in tensors)
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and triton is not None
        and IS_ENABLED
    )


def kernel_or_plain(suits: bool, kernel: Callable, plain: Callable, *arguments: Any) -> Any:
    """What `kernel` makes of the arguments if it `suits`, else `plain`; `plain` from then on, too, where the kernel
    does not compile or cannot be launched: there may be no compiler for it, or the GPU may be too small."""
    if suits and kernel not in failed:
        try:
            return kernel(*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of Triton, of a compiler or of the driver
            failed.add(kernel)
            logger.warning(f"The kernel {kernel.__name__} failed, and plain PyTorch takes its place: {error}")
    return plain(*arguments)


jit = (lambda function: function) if triton is None else triton.jit


# --- statistics of logits --------------------------------------------------------------------------------------------


@jit
def _merge(maximum, total, weighted, best, index, second):
    """Of partial statistics, each a vector: those of the whole. `total` is the sum of exp(x - maximum) and `weighted`
    that of exp(x - maximum) * (x - maximum); `best`, `index` and `second` are the two likeliest tokens."""
    overall = tl.max(maximum, axis=0)
    # Infinite differences count for nothing, but times 0 they would be NaN.
    below = tl.maximum(maximum - tl.where(overall == float("-inf"), 0.0, overall), -1e30)
    scale = tl.exp(below)
    weighted = tl.sum((weighted + total * below) * scale, axis=0)
    total = tl.sum(total * scale, axis=0)
    winner = tl.max(best, axis=0)
    token = tl.min(tl.where(best == winner, index, 2147483647), axis=0)
    runner_up = tl.max(tl.where(index == token, second, best), axis=0)
    return overall, total, weighted, winner, token, runner_up


@jit
def _partial_statistics(logits, partial, vocab_size, row_stride, mask_token_id, per_part, BLOCK: tl.constexpr):
    """Of one part of the vocabulary in one row, by an online softmax in each lane."""
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    lanes = tl.arange(0, BLOCK)
    start, stop = part * per_part, tl.minimum((part + 1) * per_part, vocab_size)
    maximum, total, weighted = (
        tl.full((BLOCK,), float("-inf"), tl.float32),
        tl.zeros((BLOCK,), tl.float32),
        tl.zeros((BLOCK,), tl.float32),
    )
    best, second = tl.full((BLOCK,), float("-inf"), tl.float32), tl.full((BLOCK,), float("-inf"), tl.float32)
    index = start + lanes
    for first in range(start, stop, BLOCK):
        token = first + lanes
        x = tl.load(logits + row * row_stride + token, token < stop, float("-inf")).to(tl.float32)
        higher = tl.maximum(maximum, x)
        origin = tl.where(higher == float("-inf"), 0.0, higher)
        below, difference = tl.maximum(maximum - origin, -1e30), tl.maximum(x - origin, -1e30)
        scale, share = tl.exp(below), tl.exp(difference)
        weighted = (weighted + total * below) * scale + share * difference
        total = total * scale + share
        maximum = higher
        x = tl.where(token == mask_token_id, float("-inf"), x)
        second = tl.maximum(second, tl.minimum(best, x))
        index = tl.where(x > best, token, index)
        best = tl.maximum(best, x)
    # Where nothing but -inf was seen, the first token that may be chosen.
    index = tl.where(index == mask_token_id, index + BLOCK, index)
    maximum, total, weighted, best, index, second = _merge(maximum, total, weighted, best, index, second)
    partial += (row * parts + part) * 6
    tl.store(partial, maximum)
    tl.store(partial + 1, total)
    tl.store(partial + 2, weighted)
    tl.store(partial + 3, best)
    tl.store(partial + 4, index.to(tl.float32, bitcast=True))
    tl.store(partial + 5, second)


@jit
def _whole_statistics(partial, tokens, statistics, parts, rows, PARTS: tl.constexpr):
    row, part = tl.program_id(0), tl.arange(0, PARTS)
    place, exists = partial + (row * parts + part) * 6, part < parts
    overall, total, weighted, best, token, second = _merge(
        tl.load(place, exists, float("-inf")),
        tl.load(place + 1, exists, 0.0),
        tl.load(place + 2, exists, 0.0),
        tl.load(place + 3, exists, float("-inf")),
        tl.load(place + 4, exists, float("inf")).to(tl.int32, bitcast=True),
        tl.load(place + 5, exists, float("-inf")),
    )
    confidence = tl.exp(best - overall) / total
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(statistics + row, confidence)
    tl.store(statistics + rows + row, tl.log(total) - weighted / total)
    tl.store(statistics + 2 * rows + row, confidence - tl.exp(second - overall) / total)


def fused_token_statistics(
    logits: torch.Tensor, mask_token_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Likeliest token but `[MASK]`, its probability, the entropy, and the margin to the second, of logits (B, K, V):
    see `token_statistics.py`. Returns int64 and three float32, each (B, K)."""
    vocab_size = logits.shape[-1]
    if logits.stride(-1) != 1 or (logits.ndim == 3 and logits.stride(0) != logits.shape[1] * logits.stride(1)):
        logits = logits.contiguous()
    rows = logits.shape[:-1].numel()
    tokens = torch.empty(logits.shape[:-1], dtype=torch.long, device=logits.device)
    statistics = torch.empty((3, *logits.shape[:-1]), dtype=torch.float32, device=logits.device)
    block = min(1024, triton.next_power_of_2(vocab_size))
    # Enough parts for some programs on each multiprocessor.
    parts = max(min(512 // max(rows, 1), triton.cdiv(vocab_size, 4 * block)), 1)
    per_part = triton.cdiv(triton.cdiv(vocab_size, parts), block) * block
    parts = triton.cdiv(vocab_size, per_part)
    partial = torch.empty((rows, parts, 6), dtype=torch.float32, device=logits.device)
    _partial_statistics[rows, parts](
        logits, partial, vocab_size, logits.stride(-2), mask_token_id, per_part, BLOCK=block, num_warps=4
    )
    _whole_statistics[rows,](partial, tokens, statistics, parts, rows, PARTS=triton.next_power_of_2(parts))
    return tokens, *statistics


# --- elementwise parts of a block ------------------------------------------------------------------------------------


@jit
def _rms_norm(x, residual, weight, total, out, size, eps, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    place, exists = row * size + columns, columns < size
    values = tl.load(x + place, exists, 0.0).to(tl.float32)
    if HAS_RESIDUAL:
        values = (tl.load(residual + place, exists, 0.0).to(tl.float32) + values).to(total.dtype.element_ty)
        tl.store(total + place, values, exists)
        values = values.to(tl.float32)
    normed = values / tl.sqrt(tl.sum(values * values, axis=0) / size + eps)
    normed = normed.to(out.dtype.element_ty).to(tl.float32) * tl.load(weight + columns, exists, 0.0).to(tl.float32)
    tl.store(out + place, normed, exists)


def fused_rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """weight * x / sqrt(mean(x²) + eps), over the last dimension. With a residual of the same shape: the sum of the
    two, and the norm of that."""
    x = x.contiguous()
    out, size = torch.empty_like(x), x.shape[-1]
    total = None if residual is None else torch.empty_like(x)
    block = triton.next_power_of_2(size)
    _rms_norm[x.numel() // size,](
        x, x if residual is None else residual.contiguous(), weight, x if total is None else total, out, size, eps,
        HAS_RESIDUAL=residual is not None, BLOCK=block, num_warps=min(max(block // 512, 1), 16),
    )  # fmt: skip
    return out if residual is None else (total, out)


@jit
def _rotate(query, key, value, new_query, new_key, new_value, cos, sin, slots, columns, length, query_heads, key_heads,
            query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
            new_batch, new_head, new_row, table_stride,
            IS_KEPT: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr):  # fmt: skip
    """Some heads of the queries, or of the keys and values, at one position in a row of the batch."""
    row, batch, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    parts, column = tl.cdiv(query_heads, HEADS), tl.arange(0, HALF)[None, :]
    if part < parts:
        head = (part * HEADS + tl.arange(0, HEADS))[:, None]
        exists = head < query_heads
        source = query + batch * query_batch + row * query_row + head * query_head + column
        target = new_query + ((batch * length + row) * query_heads + head) * 2 * HALF + column
    else:
        head = ((part - parts) * HEADS + tl.arange(0, HEADS))[:, None]
        exists = head < key_heads
        source = key + batch * key_batch + row * key_row + head * key_head + column
        if IS_KEPT:
            place = tl.load(slots + row) * new_batch + tl.load(columns + row) * new_row + head * new_head + column
            moved = value + batch * value_batch + row * value_row + head * value_head + column
            tl.store(new_value + place, tl.load(moved, exists), exists)
            tl.store(new_value + place + HALF, tl.load(moved + HALF, exists), exists)
        else:
            place = batch * new_batch + row * new_row + head * new_head + column
        target = new_key + place
    first, second = tl.load(source, exists, 0.0).to(tl.float32), tl.load(source + HALF, exists, 0.0).to(tl.float32)
    table = batch * table_stride + row * HALF + column
    c, s = tl.load(cos + table), tl.load(sin + table)
    tl.store(target, first * c - second * s, exists)
    tl.store(target + HALF, second * c + first * s, exists)


def fused_rotate(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    value: torch.Tensor | None = None,
    kept: Sequence[torch.Tensor] | None = None,
    tokens: Any = None,
) -> Any:
    """Rotary embedding of queries and keys (B, heads, T, head_dim) by tables (B or 1, 1, T, head_dim / 2) in float32.

    Returns queries and keys. With `kept`, a pair of tensors (S, key heads, columns, head_dim) that lie alike, and a
    batch of 1, the keys and, as they are, the `value` go into the places in those that `tokens` have; the queries
    alone are returned."""
    batch_size, query_heads, length, size = query.shape
    key_heads = key.shape[1]
    new_query = query.new_empty(batch_size, length, query_heads, size)
    slots = columns = cos
    if kept is None or value is None:
        new_key = key.new_empty(batch_size, length, key_heads, size).transpose(1, 2)
        value, new_value = key, new_key
    else:
        (new_key, new_value), slots, columns = kept, tokens.slot, tokens.column
    query, key, value = (each if each.stride(-1) == 1 else each.contiguous() for each in (query, key, value))
    cos, sin = cos.contiguous(), sin.contiguous()
    _rotate[length, batch_size, triton.cdiv(query_heads, 8) + triton.cdiv(key_heads, 8)](
        query, key, value, new_query, new_key, new_value, cos, sin, slots, columns, length, query_heads, key_heads,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *new_key.stride()[:3],
        cos.stride(0) if cos.shape[0] > 1 else 0, IS_KEPT=kept is not None, HALF=size // 2, HEADS=8, num_warps=2,
    )  # fmt: skip
    new_query = new_query.transpose(1, 2)
    return new_query if kept is not None else (new_query, new_key)


@jit
def _silu_product(gate, up, out, gate_stride, up_stride, size, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = columns < size
    x = tl.load(gate + row * gate_stride + columns, exists, 0.0).to(tl.float32)
    activated = (x / (1.0 + tl.exp(-x))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * size + columns, activated * tl.load(up + row * up_stride + columns, exists, 0.0), exists)


def fused_silu_product(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, both (B, T, D) with rows of any distance."""
    size = gate.shape[-1]
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _silu_product[out.numel() // size, triton.cdiv(size, 2048)](
        gate, up, out, gate.stride(-2), up.stride(-2), size, BLOCK=2048, num_warps=4
    )
    return out


# --- attention of parts of rows --------------------------------------------------------------------------------------


@jit
def _partial_attention(query, key, value, tiles, out, sums, maxima, groups, scale, per_part,
                       query_head, query_row, key_slot, key_head, key_row, value_slot, value_head, value_row,
                       block_length, IN_BLOCKS: tl.constexpr, IS_WHOLE: tl.constexpr, ROWS: tl.constexpr,
                       KEYS: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip
    """The queries of one head in a tile against a part of the keys of its slot, by an online softmax to base 2."""
    part, head, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    parts, heads, count = tl.num_programs(0), tl.num_programs(1), tl.num_programs(2)
    slot, first = tl.load(tiles + tile), tl.load(tiles + count + tile)
    queries = tl.load(tiles + 2 * count + tile).to(tl.int32)
    seen = tl.load(tiles + 3 * count + tile).to(tl.int32)
    if queries == 0:
        return
    row, column, lane = tl.arange(0, ROWS), tl.arange(0, SIZE), tl.arange(0, KEYS)
    exists = (row < queries)[:, None]
    if IN_BLOCKS:  # no query sees what is behind its own block
        own = tl.load(tiles + 4 * count + tile).to(tl.int32) + row
        limit = tl.minimum((own // block_length + 1) * block_length, seen)
        seen = tl.max(tl.where(row < queries, limit, 0), axis=0)
    x = tl.load(query + head * query_head + (first + row)[:, None] * query_row + column[None, :], exists, 0.0)
    key += slot * key_slot + (head // groups) * key_head
    value += slot * value_slot + (head // groups) * value_head
    maximum = tl.full((ROWS,), -1e30, tl.float32)
    total, weighted = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, SIZE), tl.float32)
    stop = tl.minimum((part + 1) * per_part, seen)
    for begin in range(part * per_part, stop, KEYS):
        position = begin + lane
        is_seen = position < stop
        keys = tl.load(key + position[None, :] * key_row + column[:, None], is_seen[None, :], 0.0)
        scores = tl.where(is_seen[None, :], tl.dot(x, keys) * scale, float("-inf"))
        if IN_BLOCKS:
            scores = tl.where(position[None, :] < limit[:, None], scores, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, axis=1))
        share, scale_before = tl.exp2(scores - higher[:, None]), tl.exp2(maximum - higher)
        values = tl.load(value + position[:, None] * value_row + column[None, :], is_seen[:, None], 0.0)
        total = total * scale_before + tl.sum(share, axis=1)
        weighted = weighted * scale_before[:, None]
        weighted += tl.dot(share.to(values.dtype), values)
        maximum = higher
    if IS_WHOLE:
        place = out + ((first + row) * heads + head)[:, None] * SIZE + column[None, :]
        tl.store(place, weighted / total[:, None], exists)
    else:
        place = ((tile * heads + head) * parts + part) * ROWS + row
        tl.store(out + place[:, None] * SIZE + column[None, :], weighted)
        tl.store(sums + place, total)
        tl.store(maxima + place, maximum)


@jit
def _whole_attention(partial, sums, maxima, tiles, out, parts,
                     ROWS: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    row, head, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    heads, count = tl.num_programs(1), tl.num_programs(2)
    first, queries = tl.load(tiles + count + tile), tl.load(tiles + 2 * count + tile)
    if row >= queries:
        return
    part, column = tl.arange(0, PARTS), tl.arange(0, SIZE)
    exists = part < parts
    place = ((tile * heads + head) * parts + part) * ROWS + row
    maximum = tl.load(maxima + place, exists, -1e30)
    scale = tl.exp2(maximum - tl.max(maximum, axis=0))
    weighted = tl.load(partial + place[:, None] * SIZE + column[None, :], exists[:, None], 0.0)
    mixed = tl.sum(weighted * scale[:, None], axis=0) / tl.sum(tl.load(sums + place, exists, 0.0) * scale, axis=0)
    tl.store(out + ((first + row) * heads + head) * SIZE + column, mixed)


def fused_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tokens: Any, scaling: float
) -> torch.Tensor:
    """softmax(scaling * query key) value for the `tokens` of a pass (`block_cache.Tokens`): queries (1, heads, N,
    head_dim), each against what its row sees of the keys and values of its slot, (S, groups, T, head_dim). Few queries
    occupy few multiprocessors, so many keys are shared out and put together again (as in "Flash-Decoding",
    https://pytorch.org/blog/flash-decoding). Returns (1, N, heads, head_dim)."""
    _, heads, length, size = query.shape
    groups, tiles, tile, keys = heads // key.shape[1], tokens.tiles, tokens.tile, 64
    query = query if query.stride(-1) == 1 else query.contiguous()
    parts = max(min(192 // (tiles.shape[1] * heads), tokens.limit // 192), 1)
    per_part = triton.cdiv(triton.cdiv(tokens.limit, parts), keys) * keys
    parts = triton.cdiv(tokens.limit, per_part)
    out = query.new_empty(1, length, heads, size)
    partial = sums = maxima = out
    if parts > 1:
        shape, options = (tiles.shape[1], heads, parts, tile), {"dtype": torch.float32, "device": query.device}
        partial = torch.empty(*shape, size, **options)
        sums, maxima = torch.empty(2, *shape, **options)
    _partial_attention[parts, heads, tiles.shape[1]](
        query, key, value, tiles, partial, sums, maxima, groups, scaling * 1.4426950408889634, per_part,
        *query.stride()[1:3], *key.stride()[:3], *value.stride()[:3], tokens.block_causal_length or 0,
        IN_BLOCKS=tokens.block_causal_length is not None, IS_WHOLE=parts == 1,
        ROWS=tile, KEYS=keys, SIZE=size, num_warps=8 if tile > 64 else 4, num_stages=3,
    )  # fmt: skip
    if parts > 1:
        _whole_attention[tile, heads, tiles.shape[1]](
            partial, sums, maxima, tiles, out, parts, ROWS=tile, SIZE=size, PARTS=triton.next_power_of_2(parts),
            num_warps=4,
        )  # fmt: skip
    return out


# --- what a canvas remembers -----------------------------------------------------------------------------------------


@jit
def _write(token, confidence, accepted, plan, eos, ids, unmasking_step, unmasking_confidence, report, rows,
           block_length, width, mask_token_id, ids_row,
           NUM_EOS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One row. `plan` and `report` are as `Plan` and `Report`, (fields, R); of `unmasking_confidence`,
    every other number is one (`taken_apart`)."""
    row, offset = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    slot, start = tl.load(plan + row), tl.load(plan + rows + row)
    seen, number = tl.load(plan + 3 * rows + row), tl.load(plan + 6 * rows + row)
    stop, column = tl.minimum(tl.load(plan + 2 * rows + row), seen), start + offset
    exists = (offset < block_length) & (column < stop)
    place, source = slot * ids_row + column, row * block_length + offset
    current, new = tl.load(ids + place, exists, 0), tl.load(token + source, exists, 0)
    is_masked = exists & (current == mask_token_id)
    is_new = is_masked & (tl.load(accepted + source, exists, 0) != 0)
    tl.store(ids + place, new, is_new)
    tl.store(unmasking_step + place, number + tl.zeros_like(new), is_new)
    tl.store(unmasking_confidence + 2 * place, tl.load(confidence + source, exists, 0.0), is_new)
    decided = tl.min(tl.where(is_masked & (is_new == 0), column, stop), axis=0)
    end = decided * 0
    if NUM_EOS > 0:
        current = tl.where(is_new, new, current)
        is_eos = offset < 0
        for i in range(NUM_EOS):
            is_eos = is_eos | (current == tl.load(eos + i))
        first = tl.min(tl.where(is_eos & (offset < block_length) & (column < decided), column, width), axis=0)
        end = tl.where(first < width, first + 1, 0)
    tl.store(report + row, decided)
    tl.store(report + rows + row, end)
    tl.store(report + 2 * rows + row, seen)
    tl.store(plan + 6 * rows + row, number + 1)


def fused_write(canvas: Any, plan: Any, statistics: Any, accepted: torch.Tensor, masked: torch.Tensor) -> None:
    """`Canvas.write`, where no end-of-text is predicted; what is `masked` it finds itself. A program reads what it
    overwrites: one warp, so that none is ahead of another."""
    eos, (rows, length) = canvas.eos, accepted.shape
    _write[rows,](
        statistics.token.contiguous(), statistics.confidence.contiguous(), accepted.contiguous(), plan.slot,
        canvas.ids if eos is None else eos, canvas.ids, canvas.unmasking_step, canvas.unmasking_confidence,
        canvas.report(rows), rows, length, canvas.width + 1, canvas.layout.mask_token_id, canvas.ids.stride(0),
        NUM_EOS=0 if eos is None else len(eos), BLOCK=triton.next_power_of_2(length), num_warps=1,
    )  # fmt: skip
