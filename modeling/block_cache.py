# SPDX-License-Identifier: Apache-2.0; dparallel 0.2.0
"""Keys and values for block-wise decoding, kept from one pass to the next.

A masked diffusion model is bidirectional: what a position attends to changes with every token that is written.
Decoding stays close to exact all the same if only the current block is computed anew in each pass and the keys and
values of other positions are those of an earlier one ("Fast-dLLM", https://arxiv.org/abs/2505.22618). Where attention
is causal between blocks, those of a complete block never change, and this is exact.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from transformers import Cache, PreTrainedModel


@dataclass
class Tokens:
    """The tokens of a pass that computes some columns of each of its R rows. Those of a row stand one behind the
    other, those of the next row follow, and behind the last row up to N is what has no place in the canvas.

    `slot` and `column` (N,) are where a token stands in the canvas. `offset` and `size` (R,) say which tokens are a
    row's, `first` (R,) at which column they begin, and `seen` (R,) before which column it attends to everything, or,
    with a `block_causal_length`, to what is not behind a token's own block. `tiles` (5, M) are runs of up to `tile`
    tokens of a row, for the kernel of attention: the slot, the first token, how many, `seen`, and the first column; M
    is enough for any rows. `longest` bounds `size`, and `limit` bounds `seen`.
    """

    slot: torch.Tensor
    column: torch.Tensor
    first: torch.Tensor
    offset: torch.Tensor
    size: torch.Tensor
    seen: torch.Tensor
    tiles: torch.Tensor
    tile: int
    longest: int
    limit: int
    block_causal_length: int | None
    _once: dict = field(default_factory=dict)  # what is the same for all layers, by its device

    # --- what passes without kernels do ------------------------------------------------------------------------------

    def keep(self, kept: Sequence[torch.Tensor], states: Sequence[torch.Tensor]) -> None:
        """Put the rotated keys and the values of the pass, each (1, heads, N, head_dim), in their places in what is
        `kept`, each (S, heads, T, head_dim)."""
        for layer, new in zip(kept, states, strict=True):
            layer[self.slot.to(layer.device), :, self.column.to(layer.device)] = new[0].transpose(0, 1)

    def rows_of(self, kept: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Of keys and values (S, heads, T, head_dim), what the rows may attend to, (R, heads, limit, head_dim)."""
        first = self.offset.clamp(max=len(self.slot) - 1)
        return [layer[:, :, : self.limit][self.slot[first].to(layer.device)] for layer in kept]

    def pad(self, query: torch.Tensor) -> torch.Tensor:
        """Queries (1, heads, N, head_dim), a row of the pass a row, (R, heads, longest, head_dim)."""
        return query[0][:, self._padding(query.device)[0]].transpose(0, 1)

    def unpad(self, states: torch.Tensor) -> torch.Tensor:
        """What `pad` made rows of, (R, longest, ...), one token behind the other again, (1, N, ...)."""
        _, row, place = self._padding(states.device)
        return states[row, place][None]

    def _padding(self, device):
        """Of each row its tokens, (R, longest), and of each token its row and its place there, (N,)."""
        if device not in self._once:
            places = self.offset[:, None] + torch.arange(self.longest, device=self.offset.device)
            order = torch.arange(len(self.slot), device=self.offset.device)
            row = torch.searchsorted(self.offset, order, right=True) - 1
            place = (order - self.offset[row]).clamp(max=self.longest - 1)
            self._once[device] = [each.to(device) for each in (places.clamp(max=len(order) - 1), row, place)]
        return self._once[device]

    def mask(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """What is added to scores, (R, 1, longest, limit), so that nothing attends to what it does not see."""
        if (dtype, device) not in self._once:
            columns, seen = torch.arange(self.limit, device=self.seen.device), self.seen[:, None]
            if self.block_causal_length is not None:
                own = self.first[:, None] + torch.arange(self.longest, device=seen.device)
                seen = torch.minimum((own // self.block_causal_length + 1) * self.block_causal_length, seen)
            hidden = (columns >= seen[..., None]).to(device)[:, None]
            self._once[dtype, device] = added_mask(hidden, dtype).expand(-1, -1, self.longest, -1)
        return self._once[dtype, device]


def added_mask(is_hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to scores, of the same shape, so that nothing attends to what is hidden."""
    return torch.zeros_like(is_hidden, dtype=dtype).masked_fill_(is_hidden, torch.finfo(dtype).min)


class BlockCache(Cache):
    """Keys and values of all positions of a canvas, each in a place of its own. A pass over some columns of some rows
    overwrites theirs, and each row attends to all that it sees of its own slot; nothing grows, and nothing moves.
    `layers.attention` is what reads and writes it.

    Args:
        slots (`int`): rows of the canvas, S.
        width (`int`): columns of the canvas, T.
    """

    def __init__(self, slots: int, width: int):
        super().__init__(layers=[])
        self.slots, self.width = slots, width
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.tokens: Tokens  # of the pass, see `place`

    def place(self, tokens: Tokens) -> "BlockCache":
        """The next pass computes these."""
        self.tokens = tokens
        return self

    def of_layer(self, layer_idx: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all rows and columns, (S, heads, T, head_dim). At first, the device and so on are those
        of a tensor `like` (1, heads, N, head_dim)."""
        if layer_idx == len(self.keys):
            for layers in (self.keys, self.values):
                layers.append(like.new_zeros(self.slots, like.shape[1], self.width, like.shape[3]))
        return self.keys[layer_idx], self.values[layer_idx]

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(
            "`block_cache` needs a model whose layers call `attention` of layers.py: this one calls "
            "`past_key_values.update`, which keeps whole sequences."
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # positions are always given


class ConversationCache:
    """Keys and values of B texts, kept from one call of `generate(past_key_values=...)` to the next. It comes from
    `model.conversation_cache()`.

    Where attention is causal between blocks, keys and values of a complete block never change. A call takes those of
    the blocks that its prompts have in common with the texts, and computes everything from the first difference on: a
    chat template may have written earlier turns anew. Then it keeps those of its own texts, prompts and answers, up
    to the last block: that one was never computed complete. `copy.deepcopy` begins a second conversation from there.

    Weights and active adapters must not change in between.

    Attributes:
        ids (list of B lists of `int`): of each row, the tokens whose keys and values are kept.
        keys, values (lists of tensors of shape `(B, heads, T, head_dim)`): of each layer, with T tokens of the longest
            row.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = weakref.ref(model)
        self.ids: list[list[int]] = []
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def common(self, prompts: Sequence[Sequence[int]], block_length: int) -> list[int]:
        """How many of the first tokens of each prompt are kept, in whole blocks."""
        found = []
        for kept, prompt in zip(self.ids or [[]] * len(prompts), prompts, strict=True):
            pairs = enumerate(zip(kept, prompt, strict=False))
            length = next((i for i, (old, new) in pairs if old != new), min(len(kept), len(prompt)))
            found.append(length // block_length * block_length)
        return found

    def load(self, cache: BlockCache) -> None:
        """Put what is kept of row i into slot i."""
        for kept, place in ((self.keys, 0), (self.values, 1)):
            for i, layer in enumerate(kept):
                whole = cache.of_layer(i, layer)[place]
                width = min(whole.shape[2], layer.shape[2])
                whole[: len(layer), :, :width] = layer[:, :, :width]

    def keep(self, cache: BlockCache, ids: list[list[int]]) -> None:
        """Keep those of slot i for row i, whose text begins with these ids."""
        longest = max(map(len, ids))
        self.ids = ids
        self.keys, self.values = (
            [layer[: len(ids), :, :longest].clone() for layer in layers] for layers in (cache.keys, cache.values)
        )
