# SPDX-License-Identifier: Apache-2.0; dparallel 0.2.0
"""The canvas: the rows that are being decoded, as tensors that stay on the device and in their place.

A row stands in a slot, its tokens from column 0 on: the prompt, the answer, `[MASK]` where that is not written yet.
What a pass does with which row is a plan, a few numbers a row, which the host sends before the pass; what came of it
is a report of a few numbers a row, which the host reads after it. So a step can be captured once and replayed.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from .block_cache import BlockCache, Tokens
from .token_statistics import TokenStatistics
from .triton_kernels import fused_write, kernel_or_plain, suit_kernels

MAX_TILE = 128  # tokens of a row that the kernel of attention takes at a time at most


class Layout(NamedTuple):
    """What decides the shapes of a canvas and what its steps do with it: two decodings of the same layout can use the
    same tensors, one after the other."""

    slots: int
    width: int  # columns: the longest prompt and its answer
    is_cached: bool
    mask_token_id: int
    eos: tuple[int, ...]  # what ends a row
    eos_threshold: float | None
    block_causal_length: int | None  # of the model
    device: torch.device


class Plan(NamedTuple):
    """What a pass does with each of its R rows. On the host arrays (R,), on the device tensors (R,), all int64.

    `slot` is the row's. `start` and `stop` are the columns between which it may be written, `seen` the one before
    which it attends to all. `quota` is how many tokens a scheduled policy writes. `request` and `number`, of the row
    and of its pass, are what random numbers depend on. With a cache, `size` columns are computed from `first` on, as
    the tokens of the pass from `offset` on (see `Tokens`); without one, all that the row sees.
    """

    slot: Any
    start: Any
    stop: Any
    seen: Any
    quota: Any
    request: Any
    number: Any
    first: Any
    size: Any
    offset: Any


class Shape(NamedTuple):
    """The shapes of a pass: how many `rows` it takes, `seen` columns that the rows which see most attend to, `block`
    columns that may be written of each row. With a cache, `tokens` that are computed in all, and the `longest` run of
    them that is one row's; else 0."""

    rows: int
    seen: int
    block: int
    tokens: int
    longest: int

    @property
    def tile(self) -> int:
        """Tokens that the kernel of attention takes at a time."""
        return min(max(power_of_2(self.longest), 16), MAX_TILE)

    @property
    def tiles(self) -> int:
        """How many of those there may be."""
        return self.tokens // self.tile + self.rows


class Report(NamedTuple):
    """What came of a pass, arrays (R,): of each row the first column of its block that is still to be written (the
    block's stop where none is), the column behind its end-of-text (0: it has not ended), and what it now sees."""

    decided: np.ndarray
    end: np.ndarray
    seen: np.ndarray


def taken_apart(state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of the state of rows (N, 3, T), int64: their tokens and the passes that wrote them, int64, and their
    confidences, float32, each (N, T)."""
    return state[:, 0], state[:, 1], state[:, 2].view(torch.float32)[:, ::2]


def power_of_2(number: int) -> int:
    """The next one from this number on."""
    return 1 << (number - 1).bit_length()


class Canvas:
    """The state of one decoding, with S slots of T columns. One more slot and one more column are for what has no
    place: rows that fill up a captured step, and positions behind a short block.

    Attributes:
        state (S + 1, 3, T + 1): of all rows, see `taken_apart`.
        ids (S + 1, T + 1): the tokens.
        unmasking_step, unmasking_confidence (S + 1, T + 1): see `DiffusionGenerationOutput`.
        cache: keys and values of the canvas (`BlockCache`), or None.
        threshold (), seed (): of the call.
        numbers: what the host sent of the plan, see `send`.
        offsets (T + 1,): 0, 1, ...
    """

    def __init__(self, layout: Layout):
        self.layout = layout
        self.slots, self.width = layout.slots, layout.width
        shape = (self.slots + 1, self.width + 1)

        def new(*shape, dtype=torch.long):
            return torch.zeros(shape, dtype=dtype, device=layout.device)

        self.eos = torch.tensor(layout.eos, device=layout.device) if layout.eos else None
        self.state = new(shape[0], 3, shape[1])  # one tensor, so that a row comes and goes in one copy
        self.ids, self.unmasking_step, self.unmasking_confidence = taken_apart(self.state)
        self.cache = BlockCache(*shape) if layout.is_cached else None
        self.threshold, self.seed = new(dtype=torch.float32), new()
        self.offsets = torch.arange(self.width + 1, device=layout.device)
        numbers = len(Plan._fields) * shape[0]
        if layout.is_cached:  # slot and column of each token, and five numbers a tile
            most = Shape(shape[0], self.width, 0, self.slots * self.width * 9 // 8 + 64, 1)
            numbers += 2 * most.tokens + 5 * most.tiles
        self.numbers, self._report = new(numbers), new(len(Report._fields) * shape[0])
        # On the host, from where the device copies while the host goes on. Each is written once between two looks;
        # of the numbers there are two, for the two plans that may be sent.
        is_pinned = layout.device.type == "cuda"
        self._host_numbers = [torch.zeros(numbers, dtype=torch.long, pin_memory=is_pinned) for _ in range(2)]
        # The state of new rows, and behind it their slots.
        self._host_state = torch.zeros(self.slots, 3 * shape[1] + 1, dtype=torch.long, pin_memory=is_pinned)
        self._host_state[:, shape[1] : 2 * shape[1]] = -1
        self._host_slots = torch.zeros(self.slots, dtype=torch.long, pin_memory=is_pinned)
        self._last: Plan | None = None  # what was sent last
        self.graphs = {}  # see captured_step.py

    @property
    def nbytes(self) -> int:
        tensors = [
            each for each in vars(self).values() if isinstance(each, torch.Tensor) and each.device == self.state.device
        ]
        if self.cache is not None:
            tensors += (*self.cache.keys, *self.cache.values)
        return sum(tensor.nbytes for tensor in tensors)

    def load(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Begin with these prompts, token ids, in these slots, and nothing written."""
        new = self._host_state[: len(slots)]
        staged = new.numpy()
        staged[:, : self.width + 1], staged[:, -1] = self.layout.mask_token_id, slots
        for row, prompt in zip(staged, prompts, strict=True):
            row[: len(prompt)] = prompt
        new = new.to(self.layout.device, non_blocking=True)  # all rows in one copy: calls are what takes the time
        self.state.flatten(1).index_copy_(0, new[:, -1], new[:, :-1])

    def unload(self, slots: Sequence[int], device: torch.device) -> torch.Tensor:
        """The state of these slots, (N, 3, T + 1), on a device, where it may still be under way."""
        self._host_slots.numpy()[: len(slots)] = slots
        places = self._host_slots[: len(slots)].to(self.layout.device, non_blocking=True)
        found = self.state.index_select(0, places)
        if device == found.device:
            return found
        state = torch.empty(found.shape, dtype=torch.long, device=device, pin_memory=device.type == "cpu")
        return state.copy_(found, non_blocking=True)

    # --- what the host and the device tell each other ----------------------------------------------------------------

    def send(self, plan: Plan, shape: Shape) -> None:
        """Send the plan of a step. More rows, tokens and tiles than the plan has are filled up with what has no place.
        The host may go on; between two looks, no more than two plans may be sent."""
        last, self._last = self._last, plan
        if last is not None and last.slot is plan.slot and last.quota is plan.quota:
            return  # another pass over the same: the step has counted it
        self._host_numbers.reverse()
        rows, count, sent = shape.rows, len(plan.slot), self._host_numbers[0].numpy()
        size, total = len(plan) * rows, int(plan.size.sum()) if shape.tokens else 0
        fields = self._fields(sent, rows)
        fields[:, :count] = plan
        if count < rows:
            fields[:, count:] = 0
            filled = Plan(*fields[:, count:])
            filled.slot[:], filled.seen[:], filled.offset[:] = self.slots, 1, total
        if shape.tokens and (last is None or last.slot is not plan.slot):
            self._write_runs(self._runs(sent, shape), plan, shape, total)
            size += 2 * shape.tokens + 5 * shape.tiles
        self.numbers[:size].copy_(self._host_numbers[0][:size], non_blocking=True)

    def _write_runs(self, runs, plan, shape, total):
        slot, column, tiles = runs
        slot[:total], slot[total:] = np.repeat(plan.slot, plan.size), self.slots
        column[:total] = np.arange(total) + np.repeat(plan.first - plan.offset, plan.size)
        column[total:] = self.width
        counts = -(-plan.size // shape.tile)
        row, used = np.repeat(np.arange(len(counts)), counts), int(counts.sum())
        begin = (np.arange(used) - np.repeat(np.cumsum(counts) - counts, counts)) * shape.tile
        tiles[:, used:] = 0
        tiles[0, :used], tiles[1, :used] = plan.slot[row], plan.offset[row] + begin
        tiles[2, :used], tiles[3, :used] = np.minimum(plan.size[row] - begin, shape.tile), plan.seen[row]
        tiles[4, :used] = plan.first[row] + begin

    @staticmethod
    def _fields(numbers, rows):
        """Of what is sent, the plan, (fields, R)."""
        return numbers[: len(Plan._fields) * rows].reshape(-1, rows)

    @staticmethod
    def _runs(numbers, shape):
        """Of what is sent, slot and column of each token, (N,), and the tiles, (5, M)."""
        first = len(Plan._fields) * shape.rows
        second = first + shape.tokens
        third = second + shape.tokens
        tiles = numbers[third : third + 5 * shape.tiles].reshape(5, -1)
        return numbers[first:second], numbers[second:third], tiles

    def plan(self, rows: int) -> Plan:
        """The plan of a step that takes so many rows, on the device."""
        return Plan(*self._fields(self.numbers, rows))

    def tokens(self, plan: Plan, shape: Shape) -> Tokens:
        """The tokens of such a step."""
        slot, column, tiles = self._runs(self.numbers, shape)
        return Tokens(
            slot, column, plan.first, plan.offset, plan.size, plan.seen, tiles, shape.tile, shape.longest, shape.seen,
            self.layout.block_causal_length,
        )  # fmt: skip

    def report(self, rows: int) -> torch.Tensor:
        """Where such a step writes its report, a tensor (fields, R)."""
        return self._report[: len(Report._fields) * rows].view(-1, rows)

    def look(self, step_rows: int, rows: int) -> Report:
        """The report on the first `rows` rows of a step: the one wait for the device in each pass."""
        return Report(*self.report(step_rows).cpu().numpy()[:, :rows])

    # --- what a step does --------------------------------------------------------------------------------------------

    def block_columns(self, plan: Plan, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The columns (R, K) from each row's start on, and which of them may still be written, (R, K) bool."""
        columns = plan.start[:, None] + self.offsets[:length]
        places = columns.clamp(max=self.width)
        stop = torch.minimum(plan.stop, plan.seen)[:, None]
        return columns, (columns < stop) & (self.ids[plan.slot[:, None], places] == self.layout.mask_token_id)

    def write(self, plan: Plan, masked: torch.Tensor, statistics: TokenStatistics, accepted: torch.Tensor) -> None:
        """Make the accepted tokens of the blocks final, report, and count the pass in the plan.

        Args:
            plan (`Plan`): of the step, on the device.
            masked (`torch.BoolTensor` of shape `(R, K)`): what could be written.
            statistics (`TokenStatistics`): tokens and certainties, (R, K).
            accepted (`torch.BoolTensor` of shape `(R, K)`): what is written of it.
        """
        suits = self.layout.eos_threshold is None and suit_kernels(self.unmasking_confidence)
        kernel_or_plain(suits, fused_write, plain_write, self, plan, statistics, accepted, masked)


def plain_write(
    canvas: Canvas, plan: Plan, statistics: TokenStatistics, accepted: torch.Tensor, masked: torch.Tensor
) -> None:
    columns, seen = plan.start[:, None] + canvas.offsets[: masked.shape[1]], plan.seen
    if canvas.layout.eos_threshold is not None:
        seen, masked, accepted = accept_predicted_end(canvas, plan, columns, masked, statistics, accepted)
    slot, places = plan.slot[:, None], columns.where(accepted, canvas.width)
    canvas.ids[slot, places] = statistics.token
    canvas.unmasking_step[slot, places] = plan.number[:, None].expand_as(places)
    canvas.unmasking_confidence[slot, places] = statistics.confidence
    stop = torch.minimum(plan.stop, seen)
    is_open = masked & ~accepted
    decided = torch.where(is_open, columns, stop[:, None]).amin(dim=1)
    end = torch.zeros_like(stop)
    if canvas.eos is not None:
        ids = canvas.ids[slot, columns.clamp(max=canvas.width)]
        is_end = torch.isin(ids, canvas.eos) & (columns < decided[:, None])
        first = torch.where(is_end, columns, canvas.width + 1).amin(dim=1)
        end = torch.where(first <= canvas.width, first + 1, 0)
    torch.stack((decided, end, seen), out=canvas.report(len(stop)))
    plan.number.add_(1)


def accept_predicted_end(
    canvas: Canvas,
    plan: Plan,
    columns: torch.Tensor,
    masked: torch.Tensor,
    statistics: TokenStatistics,
    accepted: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """End-of-Text Prediction: the first end-of-text of a row's block that the policy accepts, or that is likely
    enough, is written, and the row sees nothing behind it any more. Returns what rows see then, (R,), what may be
    written then, and what of it is accepted, (R, K)."""
    is_end = masked & torch.isin(statistics.token, canvas.eos)
    is_end &= accepted | (statistics.confidence >= canvas.layout.eos_threshold)
    first = torch.where(is_end, columns, canvas.width + 1).amin(dim=1)
    seen = torch.minimum(plan.seen, first + 1)
    masked = masked & (columns < seen[:, None])
    return seen, masked, (accepted | (columns == first[:, None])) & masked
