# SPDX-License-Identifier: Apache-2.0; dparallel 0.2.0
"""Keys and values for block-wise decoding, kept from one pass to the next.

A masked diffusion model is bidirectional: what a position attends to changes with every token that is written.
Decoding stays close to exact all the same if only the current block is computed anew in each pass and the keys and
values of other positions are those of an earlier one ("Fast-dLLM", https://arxiv.org/abs/2505.22618).
"""

from typing import Any

import torch
from transformers import Cache


class BlockCache(Cache):
    """Keys and values of all positions of a canvas, each in a place of its own. A pass over some positions of some
    rows overwrites theirs, and attends to all positions of the same rows; nothing grows, and nothing moves.

    Args:
        slots (`int`): rows of the canvas, S.
        width (`int`): columns of the canvas, T.
    """

    def __init__(self, slots: int, width: int):
        super().__init__(layers=[])
        self.slots, self.width = slots, width
        self.keys, self.values = [], []
        self.rows: slice | torch.Tensor = slice(slots)
        self.columns: torch.Tensor | None = None
        self.seen = width

    def place(self, rows: slice | torch.Tensor, columns: torch.Tensor | None, seen: int) -> "BlockCache":
        """The next pass is one over these rows, the first R as a slice or any as a tensor (R,), and of each over these
        columns, a tensor (R, Q), or over those before `seen` (None). It sees those before `seen`."""
        self.rows, self.columns, self.seen = rows, columns, seen
        return self

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the rotated keys and the values (R, heads, Q, head_dim) of a pass over Q positions of R rows; returns
        those of all positions that it sees."""
        for layer, states in zip(self.of_layer(layer_idx, key_states), (key_states, value_states), strict=True):
            rows = self.rows if isinstance(self.rows, slice) else self.rows.to(layer.device)
            if self.columns is None:
                layer[rows, :, : self.seen] = states
            else:
                rows = torch.arange(len(states), device=layer.device) if isinstance(rows, slice) else rows
                layer[rows[:, None], :, self.columns.to(layer.device)] = states.transpose(1, 2)
        # A pass over whole rows has computed all that it sees.
        return (key_states, value_states) if self.columns is None else self.read(layer_idx)

    def of_layer(self, layer_idx: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all rows and columns, (S, heads, T, head_dim). At first, the device and so on are those
        of a tensor `like` (R, heads, Q, head_dim)."""
        if layer_idx == len(self.keys):
            for layers in (self.keys, self.values):
                layers.append(like.new_zeros(self.slots, like.shape[1], self.width, like.shape[3]))
        return self.keys[layer_idx], self.values[layer_idx]

    def read(self, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values that the pass attends to, (R, heads, seen, head_dim): a view where the rows are the first
        ones, else a copy."""
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        rows = self.rows if isinstance(self.rows, slice) else self.rows.to(keys.device)
        return keys[:, :, : self.seen][rows], values[:, :, : self.seen][rows]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # positions are always given

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0  # without a causal mask it does not matter where queries stand

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.seen, 0
