# SPDX-License-Identifier: Apache-2.0; dparallel 0.2.0
"""Which pass comes next: the rows as the host knows them, and the schedule that finishes them block by block.

A schedule is a few functions of the rows' state: `plan` says which rows the next pass takes and what it computes of
each, `settle` what a pass has changed, `advance` where a row goes on. All of them work on whole arrays, so that the
host is quick with hundreds of rows.
"""

from typing import NamedTuple

import numpy as np
import torch

from .canvas import Plan, Report
from .draws import mixed
from .unmasking import POLICIES, SCHEDULES

FREE = -1


class Rows:
    """The rows of a canvas, arrays (S,) with an entry for each slot. Places are columns, in which the prompt begins at
    0; a row's block is `start` to `stop`, the answer's first tokens up to `decided` are final.

    `request` is the number of what the row answers (`FREE`: nothing), `prompt_length` and `length` the tokens of
    prompt and answer, `seen` where what it attends to ends, `end` where its text ends once `is_finished`. `passes`
    counts its passes, `block_passes` those over its block. `is_complete`: nothing of its block is left to be written.
    """

    def __init__(self, slots: int):
        self.request = np.full(slots, FREE)
        self.prompt_length, self.length, self.start, self.stop, self.seen, self.decided, self.end = (
            np.zeros(slots, dtype=np.int64) for _ in range(7)
        )
        self.passes, self.block_passes = np.zeros(slots, dtype=np.int64), np.zeros(slots, dtype=np.int64)
        self.is_finished, self.is_complete = np.zeros(slots, dtype=bool), np.zeros(slots, dtype=bool)

    @property
    def is_taken(self) -> np.ndarray:
        return self.request != FREE

    @property
    def is_live(self) -> np.ndarray:
        return self.is_taken & ~self.is_finished

    def admit(self, slots: list[int], requests: list[int], prompt_lengths: list[int], lengths: list[int]) -> None:
        """Begin with these requests, whose answers have these lengths."""
        self.request[slots], self.prompt_length[slots], self.length[slots] = requests, prompt_lengths, lengths
        self.start[slots] = self.decided[slots] = prompt_lengths
        self.seen[slots] = self.end[slots] = self.prompt_length[slots] + self.length[slots]
        self.passes[slots], self.is_finished[slots] = 0, False

    def finish(self, slots: np.ndarray, end: np.ndarray) -> None:
        """The text of these rows ends at these columns."""
        self.end[slots], self.is_finished[slots] = end, True


class Part(NamedTuple):
    """The rows of a pass, and the shapes of what it computes: of each row the `size` columns from `plan.first` on (0:
    the first `seen`), of which `block` may be written, attending to some of the first `seen` columns."""

    plan: Plan
    size: int
    block: int
    seen: int


class BlockSchedule:
    """A row's blocks one after the other, each until nothing of it is masked; whatever the other rows do.

    What a pass computes of a row is its own matter, too: the whole row without a cache, and when the keys and values
    of others are to be renewed; else its block alone, and what else the cache wants. One pass computes as many columns
    of each of its rows, so it takes those rows that want the same: whole rows first, as such a pass is bound by its
    arithmetic whatever the number of its rows, and of other groups the largest. The others wait for the next pass.

    Args:
        block_length (`int`), unmasking (`str`): see `DiffusionGenerationConfig`.
        logits_shift (`int`): of the model.
        seed (`int`): of what is drawn.
        block_cache, cache_refresh (`str`), cache_refresh_interval (`int`, *optional*), schedule (`str`), steps (`int`,
            *optional*), eps (`float`): see `DiffusionGenerationConfig`.
        is_in_step (`bool`): all rows begin a block together, and all take part in each pass, whether they have ended
            or not: for what counts on rows of the same length.
    """

    def __init__(
        self,
        *,
        block_length: int,
        unmasking: str,
        logits_shift: int,
        seed: int,
        block_cache: str = "none",
        cache_refresh: str = "full",
        cache_refresh_interval: int | None = None,
        schedule: str = "even",
        steps: int | None = None,
        eps: float = 1e-3,
        is_in_step: bool = False,
    ):
        self.block_length, self.block_cache, self.cache_refresh = block_length, block_cache, cache_refresh
        self.interval, self.shift, self.is_in_step = cache_refresh_interval, logits_shift, is_in_step
        self.is_scheduled, self.steps = POLICIES[unmasking].is_scheduled, steps
        self.schedule, self.eps, self.seed = SCHEDULES[schedule], eps, seed
        self.is_drawn = schedule == "ancestral"
        self.block_counts: dict[tuple[int, int, int], list[int]] = {}

    # --- 2. plan -----------------------------------------------------------------------------------------------------

    def plan(self, rows: Rows) -> Part:
        """The next pass. At least one row must be live."""
        slots = np.flatnonzero(rows.is_live & ~rows.is_complete)
        sizes = self._sizes(rows, slots)
        size = int(sizes.min()) and int(np.bincount(sizes).argmax())
        slots = slots[sizes == size]
        before, count = self._before(rows, slots), self._counts(rows, slots)
        if self.is_in_step:
            taken = np.flatnonzero(rows.is_taken)
            slots, is_open = taken, np.isin(taken, slots)
            before, count = np.full(len(slots), before[0]), np.where(is_open, count.max(), 0)
        else:
            is_open = np.ones(len(slots), dtype=bool)
        start, stop, seen = rows.start[slots], rows.stop[slots], rows.seen[slots]
        plan = Plan(
            slots, start - before if size else np.zeros_like(start), start, np.where(is_open, stop, start), seen,
            count, rows.request[slots], rows.passes[slots],
        )  # fmt: skip
        # What is behind a predicted end of the text is computed up to the end of the block, and nothing sees it.
        return Part(plan, size, int((stop - start).max()), int(np.maximum(seen, stop).max()))

    def _before(self, rows, slots):
        """How many columns before its block a pass over less than the row computes."""
        # The block's first token is predicted from `shift` columns before it.
        has_previous = (rows.block_passes[slots] == 0) & (self.cache_refresh == "previous_block")
        return self.shift + np.where(has_previous, self.block_length, 0)

    def _sizes(self, rows, slots):
        """How many columns each row wants to be computed; 0 for all of it."""
        if self.block_cache == "none":
            return np.zeros(len(slots), dtype=np.int64)
        number, start, stop = rows.block_passes[slots], rows.start[slots], rows.stop[slots]
        is_whole = (number == 0) & ((start == rows.prompt_length[slots]) | (self.cache_refresh == "full"))
        if self.interval:
            is_whole |= number % self.interval == 0
        if self.block_cache == "prefix":  # whole blocks behind it, also where an end-of-text was predicted: few shapes
            blocks = -(-(rows.seen[slots] - start) // self.block_length)
            stop = np.minimum(start + blocks * self.block_length, rows.prompt_length[slots] + rows.length[slots])
        return np.where(is_whole, 0, stop - start + self._before(rows, slots))

    def _counts(self, rows, slots):
        """How many tokens a scheduled policy writes in the next pass over each row's block."""
        counts = np.zeros(len(slots), dtype=np.int64)
        for i, slot in enumerate(slots if self.is_scheduled else ()):
            block = int(rows.start[slot] - rows.prompt_length[slot]) // self.block_length
            key = (int(rows.length[slot]), block, int(rows.request[slot]) if self.is_drawn else 0)
            if key not in self.block_counts:
                self.block_counts[key] = self._count_block(*key)
            counts[i] = self.block_counts[key][rows.block_passes[slot]]
        return counts

    def _count_block(self, length, block, request):
        """How many tokens each pass over a block of an answer of this length writes."""
        blocks = -(-length // self.block_length)
        masks = min(self.block_length, length - block * self.block_length)
        steps = length if self.steps is None else self.steps
        steps = max(steps // blocks + (block < steps % blocks), 1)
        generator = torch.Generator().manual_seed(mixed(self.seed, request, block)) if self.is_drawn else None
        return self.schedule(masks, steps, eps=self.eps, generator=generator)

    # --- 5. settle ---------------------------------------------------------------------------------------------------

    def settle(self, rows: Rows, part: Part, report: Report) -> None:
        """What a pass has changed: each of its rows is one pass further, and may have completed its block or ended."""
        is_open = part.plan.stop > part.plan.start
        slots, decided, end, seen = (each[is_open] for each in (part.plan.slot, *report))
        rows.passes[slots] += 1
        rows.block_passes[slots] += 1
        rows.seen[slots] = seen
        rows.decided[slots] = np.where(end > 0, end, decided)
        rows.is_complete[slots] = decided >= np.minimum(rows.stop[slots], seen)
        rows.finish(slots[end > 0], end[end > 0])

    # --- 8. advance --------------------------------------------------------------------------------------------------

    def begin(self, rows: Rows, slots: list[int] | np.ndarray) -> None:
        """Begin the block at `start` of these rows."""
        stop = rows.prompt_length[slots] + rows.length[slots]
        rows.stop[slots] = np.minimum(rows.start[slots] + self.block_length, stop)
        rows.block_passes[slots], rows.is_complete[slots] = 0, False

    def advance(self, rows: Rows) -> None:
        """Rows whose block is complete go on with the next one, or end where there is none."""
        slots = np.flatnonzero(rows.is_live & rows.is_complete)
        if self.is_in_step and len(slots) < rows.is_live.sum():
            return
        is_last = rows.stop[slots] >= rows.seen[slots]
        rows.finish(slots[is_last], rows.seen[slots[is_last]])
        if self.is_in_step:  # those that have ended go along
            slots = np.flatnonzero(rows.is_taken & rows.is_live.any())
        else:
            slots = slots[~is_last]
        rows.start[slots] = rows.stop[slots]
        self.begin(rows, slots)
