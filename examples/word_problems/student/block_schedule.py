# SPDX-License-Identifier: Apache-2.0; dparallel 0.2.0
"""Which pass comes next: the rows as the host knows them, and the schedule that finishes them block by block.

A schedule is a few functions of the rows' state: `plan` says which rows the next pass takes and what it computes of
each, `count` that it is on its way, `settle` what it has written, `advance` where a row goes on. All of them work on
whole arrays, so that the host is quick with hundreds of rows. Where rows are few, and after a pass that completed
nothing (by what `settle` returns), `plan` is called once more while the device makes the next pass. Its plan holds
unless that pass completes something, or a criterion or a clock ends rows: so it must depend on the rows alone.
"""

import numpy as np
import torch

from .canvas import Plan, Report, Shape
from .draws import mixed
from .unmasking import POLICIES, SCHEDULES, even_schedule


class Rows:
    """The rows of a canvas, arrays (S,) with an entry for each slot. Places are columns, in which the prompt begins at
    0; a row's block is `start` to `stop`, the answer's first tokens up to `decided` are final.

    `request` is the number of what the row answers, `prompt_length` and `length` the tokens of prompt and answer,
    `seen` where what it attends to ends, `end` where its text ends once `is_finished`. With an exact cache, keys and
    values before `kept` are final. `passes` counts its passes, `block_passes` those over its block. A slot `is_taken`
    by a row until it is retired, and the row `is_live` until it is finished. `is_complete`: nothing of its block is
    left to be written. `is_changed`: since the last plan, more has changed than how many passes there were.
    """

    def __init__(self, slots: int):
        self.request, self.prompt_length, self.length, self.start, self.stop, self.seen, self.decided, self.end = (
            np.zeros(slots, dtype=np.int64) for _ in range(8)
        )
        self.kept, self.passes, self.block_passes = (np.zeros(slots, dtype=np.int64) for _ in range(3))
        self.is_taken, self.is_live, self.is_finished, self.is_complete = (
            np.zeros(slots, dtype=bool) for _ in range(4)
        )
        self.is_changed = False

    def admit(
        self, slots: list[int], requests: list[int], prompt_lengths: list[int], lengths: list[int], kept: list[int]
    ) -> None:
        """Begin with these requests, whose answers have these lengths, and of whose first tokens so many are kept."""
        self.request[slots], self.prompt_length[slots], self.length[slots] = requests, prompt_lengths, lengths
        self.start[slots] = self.decided[slots] = prompt_lengths
        self.seen[slots] = self.end[slots] = self.prompt_length[slots] + self.length[slots]
        self.kept[slots], self.passes[slots], self.is_finished[slots] = kept, 0, False
        self.is_taken[slots] = self.is_live[slots] = self.is_changed = True

    def finish(self, slots: np.ndarray, end: np.ndarray) -> None:
        """The text of these rows ends at these columns."""
        self.end[slots], self.is_finished[slots], self.is_live[slots], self.is_changed = end, True, False, True

    def retire(self, slots: np.ndarray) -> None:
        """Leave these slots to others."""
        self.is_taken[slots] = self.is_live[slots] = self.is_finished[slots] = self.is_complete[slots] = False


class BlockSchedule:
    """A row's blocks one after the other, each until nothing of it is masked; whatever the other rows do.

    What a pass computes of a row is its own matter, too: the whole row without a cache, and when the keys and values
    of others are to be renewed; else its block alone, and what else the cache wants. With a cache, all live rows take
    part in every pass, each with as many tokens as it wants: a pass over few tokens costs as much as reading the
    weights, so two passes over some of the rows each would cost more than one over all.

    Args:
        block_length (`int`), unmasking (`str`): see `DiffusionGenerationConfig`.
        logits_shift (`int`): of the model.
        seed (`int`): of what is drawn.
        block_causal_length (`int`, *optional*): of the model. Blocks then count from the row's first token, so that
            the first one may begin with the end of the prompt.
        block_cache, cache_refresh (`str`), cache_refresh_interval (`int`, *optional*), schedule (`str`), steps (`int`,
            *optional*), steps_per_block (`int`, *optional*), eps (`float`): see `DiffusionGenerationConfig`.
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
        block_causal_length: int | None = None,
        block_cache: str = "none",
        cache_refresh: str = "full",
        cache_refresh_interval: int | None = None,
        schedule: str = "even",
        steps: int | None = None,
        steps_per_block: int | None = None,
        eps: float = 1e-3,
        is_in_step: bool = False,
    ):
        self.block_length, self.block_cache, self.cache_refresh = block_length, block_cache, cache_refresh
        self.interval, self.shift, self.is_in_step = cache_refresh_interval, logits_shift, is_in_step
        self.grid, self.steps, self.steps_per_block = block_causal_length, steps, steps_per_block
        policy, self.unmasking = POLICIES[unmasking], unmasking
        self.has_quota = policy.is_scheduled or (policy.takes_count and steps_per_block is not None)
        self.schedule, self.eps, self.seed = SCHEDULES[schedule], eps, seed
        self.is_drawn = schedule == "ancestral"
        self.block_counts: dict[tuple[int, int, int, int], list[int]] = {}
        self.last: tuple[Plan, Shape]

    # --- 2. plan -----------------------------------------------------------------------------------------------------

    def plan(self, rows: Rows) -> tuple[Plan, Shape]:
        """The next pass. At least one row must be live."""
        if not rows.is_changed:  # most passes are like the one before, and the host is quick with them
            plan, shape = self.last
            count = self._counts(rows, plan.slot) if self.has_quota else plan.quota
            count = plan.quota if (count == plan.quota).all() else count
            self.last = plan._replace(quota=count, number=rows.passes[plan.slot]), shape
            return self.last
        slots = np.flatnonzero(rows.is_live & ~rows.is_complete)
        count = self._counts(rows, slots)
        if self.is_in_step:
            taken = np.flatnonzero(rows.is_taken)
            is_open = np.isin(taken, slots)
            slots, count = taken, np.bincount(np.flatnonzero(is_open), count, len(taken)).astype(np.int64)
        start, stop, seen = rows.start[slots], rows.stop[slots], rows.seen[slots]
        first, size = self._computed(rows, slots)
        offset = np.cumsum(size) - size
        plan = Plan(
            slots, start, np.where(is_open, stop, start) if self.is_in_step else stop, seen, count,
            rows.request[slots], rows.passes[slots], first, size, offset,
        )  # fmt: skip
        # What is behind a predicted end of the text is computed up to the end of the block, and nothing sees it.
        limit, block = int(np.maximum(seen, stop).max()), int((stop - start).max())
        shape = Shape(len(slots), limit, block, int(offset[-1] + size[-1]), int(size.max()))
        self.last, rows.is_changed = (plan, shape), False
        return plan, shape

    def _computed(self, rows, slots):
        """From which column on how many columns of each row are computed with a cache; else nothing."""
        start, stop, seen = rows.start[slots], rows.stop[slots], rows.seen[slots]
        if self.block_cache == "none":
            return np.zeros_like(start), np.zeros_like(start)
        number = rows.block_passes[slots]
        is_first = number == 0
        if self.block_cache == "exact":  # keys and values of a block are final once it has been computed complete
            begin = np.minimum(start // self.block_length * self.block_length, start - self.shift)
            first = np.where(is_first, np.minimum(rows.kept[slots], begin), begin)
            return first, stop - first
        is_whole = is_first & ((start == rows.prompt_length[slots]) | (self.cache_refresh == "full"))
        if self.interval:
            is_whole |= number % self.interval == 0
        first = start - self.shift  # where the block's first token is predicted
        if self.cache_refresh == "previous_block":
            first = first - np.where(is_first, self.block_length, 0)
        first = np.where(is_whole, 0, first)
        is_long = is_whole | (self.block_cache == "prefix")
        return first, np.where(is_long, np.maximum(seen, stop), stop) - first

    def _counts(self, rows, slots):
        """How many tokens the next pass over each row's block writes, by the schedule, or at least."""
        counts = np.zeros(len(slots), dtype=np.int64)
        for i, slot in enumerate(slots if self.has_quota else ()):
            begin = int(rows.start[slot] - rows.prompt_length[slot])
            masks = int(rows.stop[slot] - rows.start[slot])
            key = (int(rows.length[slot]), begin, masks, int(rows.request[slot]) if self.is_drawn else 0)
            if key not in self.block_counts:
                self.block_counts[key] = self._count_block(*key)
            block, number = self.block_counts[key], rows.block_passes[slot]
            counts[i] = block[number] if number < len(block) else 0  # planned ahead of the pass that completes it
        return counts

    def _count_block(self, length, begin, masks, request):
        """How many tokens each pass over a block writes, of which so many are masked, from this one of the answer's
        tokens on."""
        steps = length if self.steps is None else self.steps
        if self.steps_per_block is not None:
            counts = even_schedule(self.block_length, min(self.steps_per_block, self.block_length))
            written = np.minimum(np.cumsum(counts), masks)
            return [count for count in np.diff(written, prepend=0).tolist() if count]
        if self.grid is not None:  # blocks may be of unequal lengths, so each gets its share
            block = begin
            steps = max(steps * (begin + masks) // length - steps * begin // length, 1)
        else:
            blocks, block = -(-length // self.block_length), begin // self.block_length
            steps = max(steps // blocks + (block < steps % blocks), 1)
        generator = torch.Generator().manual_seed(mixed(self.seed, request, block)) if self.is_drawn else None
        return self.schedule(masks, steps, eps=self.eps, generator=generator)

    # --- 3. while the device makes the pass --------------------------------------------------------------------------

    def count(self, rows: Rows, plan: Plan) -> None:
        """A pass has begun: each of its rows is one pass further."""
        slots = plan.slot[plan.stop > plan.start] if self.is_in_step else plan.slot
        rows.passes[slots] += 1
        rows.block_passes[slots] = number = rows.block_passes[slots] + 1
        if (number > self.block_length).any():
            raise ValueError(
                f"`unmasking={self.unmasking!r}` wrote nothing in some passes, so decoding might never end: a policy "
                f"must accept at least one masked position of each row, such as `best(statistics.confidence, masked)`."
            )
        if self.block_cache == "exact":  # what is before the block is computed with it, or was before
            rows.kept[slots] = rows.start[slots] // self.block_length * self.block_length
        if self.block_cache != "none" and (self.interval is not None or (number == 1).any()):
            rows.is_changed = True  # the next pass computes something else

    # --- 5. settle ---------------------------------------------------------------------------------------------------

    def settle(self, rows: Rows, plan: Plan, report: Report) -> bool:
        """What a pass has written. Returns whether that makes the next pass another one: whether any of its rows has
        completed its block, ended, or sees less, or rows are kept in step."""
        slots, decided, end, seen = plan.slot, *report
        if self.is_in_step:
            is_open = plan.stop > plan.start
            slots, decided, end, seen = (each[is_open] for each in (slots, *report))
        rows.decided[slots] = decided
        is_complete, is_end = decided >= np.minimum(rows.stop[slots], seen), end > 0
        is_other = self.is_in_step or bool((is_complete | is_end | (seen != rows.seen[slots])).any())
        if is_other:
            rows.seen[slots], rows.is_complete[slots], rows.is_changed = seen, is_complete, True
            rows.decided[slots[is_end]] = end[is_end]
            rows.finish(slots[is_end], end[is_end])
        return is_other

    # --- 8. advance --------------------------------------------------------------------------------------------------

    def begin(self, rows: Rows, slots: list[int] | np.ndarray) -> None:
        """Begin the block at `start` of these rows."""
        start, stop = rows.start[slots], rows.prompt_length[slots] + rows.length[slots]
        begin = start if self.grid is None else start // self.grid * self.grid
        rows.stop[slots] = np.minimum(begin + self.block_length, stop)
        rows.block_passes[slots], rows.is_complete[slots], rows.is_changed = 0, False, True

    def advance(self, rows: Rows) -> None:
        """Rows whose block is complete go on with the next one, or end where there is none."""
        if not rows.is_changed:
            return
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
