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
    """Keys and values of all positions of a canvas, each in a slot of its own. A pass over some of the positions
    overwrites theirs and attends to all; nothing grows, and nothing moves.

    Args:
        length (`int`): positions of the canvas, T.
    """

    def __init__(self, length: int):
        super().__init__(layers=[])
        self.length = length
        self.keys, self.values = [], []
        self.positions, self.stop = None, length

    def place(self, positions: torch.Tensor | None, stop: int) -> "BlockCache":
        """The next pass is one over these positions, a tensor (Q,), or over all before `stop` (None); it sees those
        before `stop`."""
        self.positions, self.stop = positions, stop
        return self

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the rotated keys and the values (B, heads, Q, head_dim) of a pass over Q positions; returns those of
        all positions that it sees."""
        keys, values, slots = self.of_layer(layer_idx, key_states)
        slots = slice(self.stop) if slots is None else slots
        keys[:, :, slots], values[:, :, slots] = key_states, value_states
        return self.seen(layer_idx)

    def of_layer(self, layer_idx: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Keys and values of all positions (B, heads, T, head_dim), and which of them the pass computes (Q,), None for
        all before `stop`. At first, the device and so on are those of a tensor `like` (B, heads, Q, head_dim)."""
        if layer_idx == len(self.keys):
            for layers in (self.keys, self.values):
                layers.append(like.new_zeros(*like.shape[:2], self.length, like.shape[3]))
        positions = None if self.positions is None else self.positions.to(like.device)
        return self.keys[layer_idx], self.values[layer_idx], positions

    def seen(self, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values that the pass attends to."""
        return self.keys[layer_idx][:, :, : self.stop], self.values[layer_idx][:, :, : self.stop]

    def take_rows(self, other: "BlockCache", rows: torch.Tensor) -> None:
        """Keep what another cache of this length holds for these rows (a tensor of their numbers)."""
        for mine, others in ((self.keys, other.keys), (self.values, other.values)):
            for layer, states in enumerate(others):
                taken = states[rows.to(states.device)]
                if layer == len(mine):
                    mine.append(taken)
                else:
                    mine[layer].copy_(taken)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # positions are always given

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0  # without a causal mask it does not matter where queries stand

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.stop, 0
