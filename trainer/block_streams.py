"""The pass that trains a block-causal model, with every block of a row at once.

What a block's `[MASK]` may see is the block itself and the blocks before it as they are. One pass over all blocks
therefore reads the row as it is, the clean stream, and beside it views of the same row with tokens hidden: each token
of a view sees its own block in that view, and the blocks before it in the clean stream (Block Diffusion,
https://arxiv.org/abs/2503.09573, with one view). Logits and gradients are those of as many passes as there are blocks,
each over a row that is cut off behind its block.
"""

from typing import Any, NamedTuple

import torch
from torch.nn.attention.flex_attention import create_block_mask

from .masking import blocks_of_columns

# FlexAttention computes tiles of so many positions, and is compiled anew for lengths of another kind.
FLEX_TILE = 128


class Streams(NamedTuple):
    """Arguments of the model's `forward`: `input_ids` (B, S), `position_ids` (1, S), `attention_mask`, which is bool
    (B or 1, 1, S, S) or a `BlockMask`, and `logits_to_keep` (B, V * M), places in the streams, in each row those of
    its first view first."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: Any
    logits_to_keep: torch.Tensor


def block_streams(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    shown: torch.Tensor,
    positions: torch.Tensor,
    *,
    first: int,
    block_length: int,
    logits_shift: int,
    use_flex: bool,
) -> Streams:
    """The streams of a batch.

    Args:
        input_ids, attention_mask (`torch.LongTensor` of shape `(B, T)`): rows, padded behind.
        shown (`torch.LongTensor` of shape `(V * B, T)`): the rows as views show them, all first views first.
        positions (`torch.LongTensor` of shape `(V * B, M)`): whose tokens are to be predicted.
        first (`int`): the first column that any row learns. Views begin with its block: before it are prompts alone.
        block_length (`int`): of the model.
        logits_shift (`int`): of the model. With 1, a block's first token is predicted by the token before it, which
            lies in the block before, and so in the clean stream: as in decoding.
        use_flex (`bool`): a `BlockMask` for FlexAttention instead of a dense mask.
    """
    (batch, width), device = input_ids.shape, input_ids.device
    views, begin = len(shown) // batch, first // block_length * block_length
    columns = torch.arange(width, device=device)
    column = torch.cat((columns, columns[begin:].repeat(views)))
    numbers = torch.arange(1, views + 1, device=device)
    view = torch.cat((torch.zeros_like(columns), numbers.repeat_interleave(width - begin)))
    ids = torch.cat((input_ids, shown.view(views, batch, width)[:, :, begin:].transpose(0, 1).flatten(1)), dim=1)
    is_real = attention_mask.bool()[:, column]
    if use_flex and (fill := -len(column) % FLEX_TILE):
        streams = (column, view, ids, is_real)
        column, view, ids, is_real = (torch.nn.functional.pad(each, (0, fill)) for each in streams)
    predicting = (positions - logits_shift).clamp(min=0)
    in_view = width + (numbers - 1).repeat_interleave(batch)[:, None] * (width - begin) + predicting - begin
    block = blocks_of_columns(positions, block_length)
    places = torch.where(blocks_of_columns(predicting, block_length) < block, predicting, in_view).clamp(min=0)
    places = places.view(views, batch, -1).transpose(0, 1).flatten(1)
    mask = stream_mask(blocks_of_columns(column, block_length), view, is_real, use_flex)
    return Streams(ids, column[None], mask, places)


def stream_mask(block: torch.Tensor, view: torch.Tensor, is_real: torch.Tensor, use_flex: bool = False) -> Any:
    """Who sees whom: bool (B, 1, S, S), (1, 1, S, S) where rows are alike, or a `BlockMask`.

    Args:
        block, view (`torch.LongTensor` of shape `(S,)`): the block that a position belongs to, and its view, 0 for the
            clean stream.
        is_real (`torch.BoolTensor` of shape `(B, S)`): no padding.
    """

    def sees(row, head, query, key):
        is_before = (view[key] == 0) & (block[key] < block[query])
        is_beside = (view[key] == view[query]) & (block[key] == block[query])
        return (is_before | is_beside) & is_real[row, key]

    rows, length, device = 1 if (is_real == is_real[:1]).all() else len(is_real), len(block), block.device
    if use_flex:
        return create_block_mask(sees, rows, None, length, length, device=device)
    place = torch.arange(length, device=device)
    return sees(torch.arange(rows, device=device)[:, None, None, None], None, place[:, None], place)


def by_views(logits: torch.Tensor, views: int) -> torch.Tensor:
    """Logits (B, V * M, C) of the streams as those of views, (V * B, M, C), all first views first."""
    return logits.unflatten(1, (views, -1)).transpose(0, 1).flatten(0, 1)
