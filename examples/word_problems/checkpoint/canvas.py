# SPDX-License-Identifier: Apache-2.0; dparallel 0.2.0
"""The canvas: prompts, answers as far as they are written, and what is known of each position and row."""

from typing import NamedTuple

import torch

from .block_cache import BlockCache
from .token_statistics import TokenStatistics
from .triton_kernels import MAX_WRITE_LENGTH, fused_write, suit_kernels

# What a Canvas holds for each row, and what of it is left when the row has ended.
ROW_RESULTS = ("ids", "end", "num_passes", "unmasking_step", "unmasking_confidence")
ROW_STATE = (*ROW_RESULTS, "undecided", "reach", "finished", "attention_mask", "position_ids")


class Layout(NamedTuple):
    """What decides the shapes of a canvas and what its steps do with it: two decodings of the same layout can use the
    same tensors, one after the other."""

    batch_size: int
    prompt_length: int
    length: int  # of the answer
    is_padded: bool
    is_cached: bool
    mask_token_id: int
    eos: tuple[int, ...]  # what ends a row
    eos_threshold: float | None
    device: torch.device


class Canvas:
    """The state of one decoding. All of it stays on the device and in its place, so that a step can be captured once
    and replayed; `look` brings the little that the loop decides by to the host, once a step.

    Attributes (B rows, prompts of P and answers of G tokens):
        ids (B, P + G): the canvas; position_ids: the same shape, or None for 0, 1, ...
        attention_mask (B, P + G): 0 at keys nobody attends to, or None.
        cache: keys and values of the canvas (`BlockCache`), or None.
        undecided (B, G): positions that are still to be written.
        end (B,): length of the answer; G until a row ends earlier.
        reach (B,): part of the answer that takes part in the computation; G unless an end-of-text was predicted.
        finished (B,): the row has ended.
        num_passes (B,), unmasking_step (B, G), unmasking_confidence (B, G): see DiffusionGenerationOutput.
        block_start (): where the current block begins in the answer; block_length: its tokens (`int`).
        setting (): the policy's number for this step.
        padding: columns before the prompts, which fill the canvas up (`int`).
    """

    def __init__(self, layout: Layout):
        self.layout = layout
        batch_size, self.prompt_length, self.length = layout[:3]
        self.eos_threshold = layout.eos_threshold

        def new(*shape, dtype=torch.long):
            return torch.zeros(shape, dtype=dtype, device=layout.device)

        self.eos = torch.tensor(layout.eos, device=layout.device) if layout.eos else None
        self.ids = new(batch_size, self.prompt_length + self.length)
        has_mask = layout.is_padded or self.eos_threshold is not None
        self.attention_mask = torch.zeros_like(self.ids) if has_mask else None
        self.position_ids = torch.zeros_like(self.ids) if layout.is_padded else None
        self.cache = BlockCache(self.ids.shape[1]) if layout.is_cached else None
        self.undecided = new(batch_size, self.length, dtype=torch.bool)
        self.end, self.reach, self.num_passes = new(batch_size), new(batch_size), new(batch_size)
        self.finished = new(batch_size, dtype=torch.bool)
        self.unmasking_step = new(batch_size, self.length)
        self.unmasking_confidence = new(batch_size, self.length, dtype=torch.float32)
        self.block_start, self.block_length = new(), 0
        self.setting = new(dtype=torch.float32)
        self.offsets = torch.arange(self.prompt_length + self.length, device=layout.device)
        self.state = new(4, batch_size)
        self.padding = 0
        # The canvas that some rows of this one were taken from, and the numbers of all there.
        self.parent: tuple[Canvas, torch.Tensor] | None = None
        self.graphs = {}  # see captured_step.py

    def load(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> "Canvas":
        """Begin with these prompts, of P tokens or fewer, and nothing written."""
        self.padding = self.prompt_length - input_ids.shape[1]
        prompts = slice(self.padding, self.prompt_length)
        self.ids.fill_(self.layout.mask_token_id)
        self.ids[:, prompts] = input_ids
        if self.attention_mask is not None:
            self.attention_mask.fill_(1)
            self.attention_mask[:, : self.padding] = 0
            if attention_mask is not None:
                self.attention_mask[:, prompts] = attention_mask
        if self.position_ids is not None:
            self.position_ids.copy_((self.attention_mask.cumsum(dim=1) - 1).clamp(min=0))  # type: ignore[union-attr]
        for tensor, value in (
            (self.undecided, True),
            (self.end, self.length),
            (self.reach, self.length),
            (self.finished, False),
            (self.num_passes, 0),
            (self.unmasking_step, -1),
            (self.unmasking_confidence, 0.0),
        ):
            tensor.fill_(value)
        return self

    @property
    def nbytes(self) -> int:
        tensors = [each for each in vars(self).values() if isinstance(each, torch.Tensor)]
        if self.cache is not None:
            tensors += (*self.cache.keys, *self.cache.values)
        return sum(tensor.nbytes for tensor in tensors)

    @property
    def answer(self) -> torch.Tensor:
        return self.ids[:, self.prompt_length :]

    @property
    def block(self) -> torch.Tensor:
        """Positions of the current block in the answer, (K,)."""
        return self.block_start + self.offsets[: self.block_length]

    def enter(self, block: slice) -> None:
        """Go on with a block (a slice of the answer)."""
        self.block_start.fill_(block.start)
        self.block_length = block.stop - block.start

    def write(self, statistics: TokenStatistics, accepted: torch.Tensor) -> None:
        """Make the accepted tokens of the block final, and end the rows that are done. `accepted` is (B, K) bool."""
        is_simple = self.eos_threshold is None and self.length <= MAX_WRITE_LENGTH
        if is_simple and suit_kernels(self.unmasking_confidence):
            return fused_write(self, statistics, accepted)
        block = self.block
        is_counted = self.undecided[:, block].any(dim=1)
        if self.eos_threshold is not None:
            accepted = self._accept_predicted_end(block, statistics, accepted)
        for values, new in (
            (self.answer, statistics.token),
            (self.unmasking_step, self.num_passes[:, None]),
            (self.unmasking_confidence, statistics.confidence),
            (self.undecided, accepted.new_zeros(())),
        ):
            values.index_copy_(1, block, torch.where(accepted, new, values[:, block]))
        self.num_passes += is_counted
        if self.eos is not None:
            self._finish_at_eos(block)
        self.observe()

    def _accept_predicted_end(self, block, statistics, accepted):
        """End-of-Text Prediction: the first end-of-text of a row's block that the policy accepts, or that is likely
        enough, is written and becomes the row's reach."""
        ends = self.undecided[:, block] & torch.isin(statistics.token, self.eos)
        ends &= accepted | (statistics.confidence >= self.eos_threshold)
        self.reach.copy_(torch.where(ends.any(dim=1), self.block_start + ends.int().argmax(dim=1) + 1, self.reach))
        is_reached = self.offsets[: self.length] < self.reach[:, None]
        self.undecided &= is_reached
        self.attention_mask[:, self.prompt_length :] = is_reached
        is_first = ends & (block == self.reach[:, None] - 1)
        return (accepted | is_first) & self.undecided[:, block]

    def _finish_at_eos(self, block):
        """End the rows in which an end-of-text of the block stands with nothing undecided before it."""
        decided = (~self.undecided[:, block]).cumprod(dim=1).bool()
        ends = torch.isin(self.answer[:, block], self.eos) & decided
        first = self.block_start + ends.int().argmax(dim=1) + 1
        self.finish(torch.where(ends.any(dim=1), first, self.length + 1))

    def finish(self, end: torch.Tensor) -> None:
        """End each row at length `end` (B,), or not at all where that is beyond the canvas. The earliest counts."""
        self.end.copy_(torch.minimum(self.end, end))
        self.finished |= end <= self.length
        self.undecided &= ~self.finished[:, None]

    def observe(self) -> None:
        """Put together what `look` reads."""
        first = torch.where(self.undecided.any(dim=1), self.undecided.int().argmax(dim=1), self.end)
        is_open = self.undecided[:, self.block].any(dim=1)
        rows = (is_open, self.finished, torch.minimum(first, self.end), self.reach)
        torch.stack([row.long() for row in rows], out=self.state)

    def look(self) -> tuple[bool, list[int], list[int], int]:
        """The step's one wait for the device. Returns whether the block still holds an undecided position, and lists
        over the rows: has it ended, and the length of its decided text; last the part of the answer that passes still
        have to cover."""
        is_open, finished, decided, reach = self.state.tolist()
        unfinished_reach = (length for length, ended in zip(reach, finished, strict=True) if not ended)
        return any(is_open), finished, decided, max(unfinished_reach, default=0)

    def take_rows(self, parent: "Canvas", rows: torch.Tensor) -> "Canvas":
        """Go on with these rows (a tensor of their numbers) of another canvas, until `reunite`."""
        self.parent, self.padding = (parent, rows), parent.padding
        for name in ROW_STATE:
            if getattr(parent, name) is not None:
                getattr(self, name).copy_(getattr(parent, name)[rows])
        if self.cache is not None and parent.cache is not None:
            self.cache.take_rows(parent.cache, rows)
        return self

    def reunite(self) -> "Canvas":
        """Give the rows' results back to the canvas that they came from, and return that."""
        (parent, rows), self.parent = self.parent, None  # type: ignore[misc]
        for name in ROW_RESULTS:
            getattr(parent, name)[rows] = getattr(self, name)
        return parent
