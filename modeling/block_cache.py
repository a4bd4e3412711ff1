"""Keys and values for block-wise decoding, kept from one pass to the next.

A masked diffusion model is bidirectional: what a position attends to changes with every token that is written.
Decoding stays close to exact all the same if only the current block is computed anew in each pass and the keys and
values of other positions are those of an earlier one ("Fast-dLLM", https://arxiv.org/abs/2505.22618).
"""

from transformers import Cache


class BlockCache(Cache):
    """Keys and values of all positions of a canvas, each in a slot of its own. A pass over some of the positions
    overwrites theirs and attends to all; nothing grows.

    Args:
        length (`int`): positions of the canvas, T.
    """

    def __init__(self, length: int):
        super().__init__(layers=[])
        self.length = length
        self.keys, self.values = [], []
        self.start, self.stop = 0, length

    def place(self, start: int, stop: int) -> "BlockCache":
        """The next pass is one over the positions from `start` on, and sees those before `stop`."""
        self.start, self.stop = start, stop
        return self

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Keep the rotated keys and the values (B, heads, Q, head_dim) of a pass over Q positions; returns those of
        all positions that it sees."""
        first, last = self.start, self.start + key_states.shape[2]
        kept = []
        for states, layers in ((key_states, self.keys), (value_states, self.values)):
            if layer_idx == len(layers):  # on the layer's own device
                layers.append(states.new_zeros(*states.shape[:2], self.length, states.shape[3]))
            layers[layer_idx][:, :, first:last] = states
            kept.append(states if (first, last) == (0, self.stop) else layers[layer_idx][:, :, : self.stop])
        return tuple(kept)

    def select_rows(self, rows):
        """Keep these rows of the batch (a tensor of their numbers) alone."""
        for layers in (self.keys, self.values):
            layers[:] = [states[rows.to(states.device)] for states in layers]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.start

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.start

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.stop, 0
