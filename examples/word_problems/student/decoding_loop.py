# SPDX-License-Identifier: Apache-2.0; dparallel 0.2.0
"""The loop that decodes: one for every model family, policy, cache and way to call it.

Rows are independent of each other. Each holds a prompt and an answer in progress, in a slot of the canvas, and goes
through its blocks at its own pace; a slot whose row has ended takes the next prompt. See `DecodingLoop.run`.
"""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import GenerationConfig, GenerationMixin, MaxTimeCriteria, PreTrainedModel
from transformers.generation import BaseStreamer, LogitsProcessorList
from transformers.utils import logging

from .block_cache import ConversationCache
from .block_schedule import BlockSchedule, Rows
from .canvas import MAX_TILE, Canvas, Layout, Plan, Shape, power_of_2
from .captured_step import CapturedSteps
from .draws import POSITIONS, TOKENS, uniform
from .generation_config_diffusion import SAMPLING_FIELDS, DiffusionGenerationConfig
from .token_statistics import token_statistics
from .unmasking import POLICIES

logger = logging.get_logger(__name__)

FEW_ROWS = 8  # so many are planned in less time than a pass takes
ROW_BUCKET = 8  # above it, captured steps take a multiple of it of rows; below, a power of 2
TOKEN_BUCKET = 32  # captured steps compute a multiple of it of tokens; above 256, of an eighth of a power of 2
WIDTH_BUCKET = 32  # canvases and captured steps are as wide as a multiple of it, so that they are found again
_locks: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # of models: one pass at a time


class Prompt(NamedTuple):
    """What a row is to answer: the number of the request, its P token ids, how many tokens the answer has, and of how
    many of the first tokens a conversation has kept keys and values."""

    request: int
    ids: list[int]
    length: int
    kept: int = 0


class Answers(NamedTuple):
    """Of N rows that have ended at the same time: arrays (N,) of their requests, the lengths of their prompts, the
    columns where their texts end and their passes, and a tensor (N, 3, T) of their tokens, steps and confidences (see
    `taken_apart`). Once `arrived`, if that is an event and not None, it can be read."""

    requests: np.ndarray
    prompt_lengths: np.ndarray
    ends: np.ndarray
    passes: np.ndarray
    state: torch.Tensor
    arrived: torch.cuda.Event | None


class StepSettings(NamedTuple):
    """All that a step depends on beside the model and the canvas. Two steps of equal settings are the same, so these
    are also what a captured step is found by."""

    shape: Shape
    is_in_order: bool  # the rows stand in the first slots
    is_alike: bool  # all rows see as many columns
    is_aligned: bool  # blocks begin at the same column in all rows
    select: Callable
    is_scheduled: bool
    has_quota: bool
    draws_positions: bool
    unmasking_temperature: float
    sampling: tuple | None  # values of SAMPLING_FIELDS
    unmasking_filter: Any
    filter_addresses: tuple[int, ...]


class Pass(NamedTuple):
    """A pass that is ready to be made: its plan, and the settings of the step that makes it, which may take more
    rows."""

    plan: Plan
    settings: StepSettings


# --- 2. step ---------------------------------------------------------------------------------------------------------


def decode_step(
    model: PreTrainedModel,
    canvas: Canvas,
    settings: StepSettings,
    process: Callable | None = None,
    choose: Callable | None = None,
) -> None:
    """One pass, and what the policy writes after it. Nothing here waits for the device, and what changes from step to
    step is in the canvas.

    Args:
        model (`PreTrainedModel`): a diffusion language model.
        canvas (`Canvas`): with the plan of the step; gets the report.
        settings (`StepSettings`): of the step.
        process (callable, *optional*): `(plan, logits) -> logits`, logits processors.
        choose (callable, *optional*): `(plan, columns, masked, statistics) -> (statistics, accepted)` in place of the
            policy.
    """
    plan = canvas.plan(settings.shape.rows)
    logits = block_logits(model, canvas, plan, settings)
    if process is not None:
        logits = process(plan, logits)
    columns, masked = canvas.block_columns(plan, settings.shape.block)
    draw = partial(uniform, canvas.seed, plan.request, plan.number, columns)
    warpers, draws = None, None
    if settings.sampling is not None:
        warpers, draws = sampling_warpers(settings.sampling, logits.device), draw(TOKENS)
    statistics = token_statistics(logits, canvas.layout.mask_token_id, warpers, draws)
    if settings.unmasking_filter is not None:
        exists = columns < plan.stop[:, None]
        statistics = statistics._replace(finality=settings.unmasking_filter.finality(statistics, masked, exists))
    if choose is not None:
        statistics, accepted = choose(plan, columns, masked, statistics)
    elif settings.is_scheduled:
        accepted = settings.select(
            statistics, masked, count=plan.quota[:, None], temperature=settings.unmasking_temperature,
            uniform=draw(POSITIONS) if settings.draws_positions else None,
        )  # fmt: skip
    else:
        count = {"count": plan.quota[:, None]} if settings.has_quota else {}
        accepted = settings.select(statistics, masked, threshold=canvas.threshold, **count)
    if accepted.dtype != torch.bool or accepted.shape != masked.shape:
        name = getattr(settings.select, "__name__", settings.select)
        raise ValueError(
            f"The unmasking policy {name!r} returned {accepted.dtype} of shape {tuple(accepted.shape)}: it must be "
            f"bool, of the shape {tuple(masked.shape)} of `masked`."
        )
    canvas.write(plan, masked, statistics, accepted)


def block_logits(model: PreTrainedModel, canvas: Canvas, plan: Plan, settings: StepSettings) -> torch.Tensor:
    """Logits (R, K, V) that predict the blocks' positions, from one pass of the model."""
    # Where a block is shorter than others, what is behind it is predicted from anywhere.
    predicting = plan.start[:, None] - model.logits_shift + canvas.offsets[: settings.shape.block]
    if canvas.cache is None:
        return _logits_of_rows(model, canvas, plan, settings, predicting.clamp(max=settings.shape.seen - 1))
    tokens = canvas.tokens(plan, settings.shape)
    places = torch.minimum(predicting - plan.first[:, None], plan.size[:, None] - 1) + plan.offset[:, None]
    logits = model(
        input_ids=canvas.ids[tokens.slot, tokens.column][None],
        position_ids=tokens.column[None],
        past_key_values=canvas.cache.place(tokens),
        logits_to_keep=places.clamp(0, settings.shape.tokens - 1).flatten(),
    ).logits
    if not canvas.cache.keys:
        name = type(model).__name__
        raise ValueError(f"`block_cache` needs a model that keeps `past_key_values`: {name} does not.")
    return logits.view(*places.shape, -1)


def _logits_of_rows(model, canvas, plan, settings, predicting):
    """From a pass over all that the rows see, as any model can make it."""
    rows, seen = slice(settings.shape.rows) if settings.is_in_order else plan.slot, settings.shape.seen
    logits = model(
        input_ids=canvas.ids[:, :seen][rows],
        attention_mask=None if settings.is_alike else (canvas.offsets[:seen] < plan.seen[:, None]).long(),
        position_ids=canvas.offsets[None, :seen],
        logits_to_keep=predicting[0] if settings.is_aligned else predicting,
    ).logits
    if logits.shape[:-1] != predicting.shape:
        raise ValueError(
            f"`{type(model).__name__}.forward` returned logits of shape {tuple(logits.shape)} for `logits_to_keep` of "
            f"shape {tuple(predicting.shape)}: where rows are at different places, it must apply its head to the "
            f"positions (B, L) of each row."
        )
    return logits


@lru_cache(maxsize=64)
def sampling_warpers(sampling: tuple, device: torch.device) -> LogitsProcessorList:
    """transformers' warpers for these values of `SAMPLING_FIELDS`."""
    config = GenerationConfig(do_sample=True, **dict(zip(SAMPLING_FIELDS, sampling, strict=True)))
    return GenerationMixin()._get_logits_processor(config, input_ids_seq_length=0, device=device)


# --- the loop --------------------------------------------------------------------------------------------------------


class DecodingLoop:
    """Decodes prompts with a model, by one configuration.

    Args:
        model (`PreTrainedModel`): a diffusion language model.
        config (`DiffusionGenerationConfig`): complete and checked.
        schedule (`BlockSchedule`): which pass comes next.
        slots (`int`): rows that are decoded at the same time at most.
        width (`int`): of the longest prompt with its answer.
        seed (`int`): of all that is drawn.
        eos (tuple of `int`): what ends a row.
        steps (`CapturedSteps`, *optional*): of the model.
        unmasking_filter (`UnmaskingFilter`, *optional*): to decode by.
        process (callable, *optional*): `(loop, plan, logits) -> logits`, logits processors.
        stop (callable, *optional*): `(canvas, rows, slots) -> ends`, called with the slots (N,) of rows whose block is
            complete or that have ended; returns the columns (N,) at which stopping criteria end them, where earlier.
        choose (callable, *optional*): in place of the policy, see `decode_step`.
        clocks (list of `MaxTimeCriteria`): when one of them is over, all rows end with what is decided of them.
        streamer (`BaseStreamer`, *optional*): of the one row.
        wait (callable, *optional*): called before each pass.
        device_of_answers (`torch.device`, *optional*): where answers are wanted, if not where they are.
        conversation (`ConversationCache`, *optional*): what is kept of the prompts, and will be of the texts; there
            must be a slot for each.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: DiffusionGenerationConfig,
        schedule: BlockSchedule,
        *,
        slots: int,
        width: int,
        seed: int,
        eos: tuple[int, ...] = (),
        device: torch.device,
        steps: CapturedSteps | None = None,
        unmasking_filter: Any = None,
        process: Callable | None = None,
        stop: Callable | None = None,
        choose: Callable | None = None,
        clocks: Iterable[MaxTimeCriteria] = (),
        streamer: BaseStreamer | None = None,
        wait: Callable | None = None,
        device_of_answers: torch.device | None = None,
        conversation: ConversationCache | None = None,
    ):
        self.model, self.config, self.schedule, self.steps, self.seed = model, config, schedule, steps, seed
        self.process = None if process is None else partial(process, self)
        self.criteria, self.choose, self.conversation = stop, choose, conversation
        self.lock = _locks.setdefault(model, threading.RLock())
        self.clocks, self.streamer, self.wait = list(clocks), streamer, wait
        self.device_of_answers = device if device_of_answers is None else device_of_answers
        self.layout = Layout(
            slots, _multiple(width, WIDTH_BUCKET), config.block_cache != "none", config.mask_token_id, eos,
            config.eos_threshold, schedule.grid, device,
        )  # fmt: skip
        self.waiting: deque[Prompt] = deque()
        self.is_late, self.streamed = False, 0
        self.planned: Pass | None = None  # the last one
        policy = POLICIES[config.unmasking]
        tensors = [] if unmasking_filter is None else [*unmasking_filter.parameters(), *unmasking_filter.buffers()]
        sampling = tuple(getattr(config, name) for name in SAMPLING_FIELDS) if config.do_sample else None
        self.fixed = (
            policy.select, policy.is_scheduled, schedule.has_quota,
            policy.is_drawn or config.unmasking_temperature > 0, config.unmasking_temperature, sampling,
            unmasking_filter, tuple(tensor.data_ptr() for tensor in tensors),
        )  # fmt: skip
        self._take_canvas()

    def run(self, prompts: Iterable[Prompt]) -> Iterator[Answers]:
        """Decode, and yield answers as rows end.

        1. Plan: which rows the next pass takes, and what it computes of each.
        2. Step: a forward pass, a token and a certainty for each masked position of the blocks, and the unmasking
           policy's choice which of them become final.
        3. Exchange, while the device makes the pass: rows that ended before it leave their slots, and the next prompts
           take them, to join in the pass after. Answers are yielded here, too, so that what is done with them takes no
           time of the device. Where rows are few or the pass before completed nothing, the next one is planned as it
           will be if this one completes nothing, either; else it is planned when its turn comes.
        4. Look: the host learns what is decided, and what has ended.
        5. Settle: the rows' state follows.
        6. Stop: criteria and time end rows.
        7. Stream: decided text goes to the streamer.
        8. Advance: rows whose block is complete begin the next one.
        """
        prompts, ended, following, is_calm = iter(prompts), [], None, False
        try:
            while True:
                if not self.rows.is_live.any():  # at first, and where there is no pass to do this in
                    ended += self._exchange(prompts)
                    if not self.rows.is_live.any():
                        break
                this = self._plan() if following is None or self.rows.is_changed else following  # 1
                try:
                    self._step(this.settings)  # 2
                except torch.OutOfMemoryError as error:
                    self._begin_again_with_fewer_slots(error)
                    continue
                yield from ended
                ended = self._exchange(prompts)  # 3
                self.schedule.count(self.rows, this.plan)
                following = self._plan() if is_calm or len(this.plan.slot) <= FEW_ROWS else None
                report = self.canvas.look(this.settings.shape.rows, len(this.plan.slot))  # 4
                is_calm = not self.schedule.settle(self.rows, this.plan, report)  # 5
                self._stop()  # 6
                self._stream()  # 7
                self.schedule.advance(self.rows)  # 8
            yield from ended
            if self.conversation is not None:
                self._keep()
        finally:
            if self.steps is not None and self.canvas is not None:
                self.steps.give_back(self.canvas)

    def _take_canvas(self):
        self.canvas = Canvas(self.layout) if self.steps is None else self.steps.borrow(self.layout)
        self.canvas.seed.fill_(self.seed)
        if self.config.threshold is not None:
            self.canvas.threshold.fill_(self.config.threshold)
        self.rows = Rows(self.layout.slots)

    def _exchange(self, prompts):
        """Retire rows that have ended, and admit prompts where there is room. Returns a list of `Answers`."""
        ended = self._retire()
        free = [] if self.is_late or self.rows.is_taken.all() else np.flatnonzero(~self.rows.is_taken).tolist()
        taken: list[Prompt] = []
        while len(taken) < len(free) and (prompt := self._next(prompts)) is not None:
            taken.append(prompt)
        if taken:
            slots = free[: len(taken)]
            requests, ids, lengths, kept = zip(*taken, strict=True)
            self.rows.admit(slots, requests, list(map(len, ids)), lengths, kept)
            self.schedule.begin(self.rows, slots)
            self.canvas.load(slots, ids)
            if self.conversation is not None:
                self.conversation.load(self.canvas.cache)
        return ended

    def _next(self, prompts):
        return self.waiting.popleft() if self.waiting else next(prompts, None)

    def _plan(self) -> Pass:
        """The next pass, as the rows are now. Its plan is sent."""
        (plan, shape), last = self.schedule.plan(self.rows), self.planned
        if last is not None and last.plan.slot is plan.slot:  # it is like the last one
            self.planned = last._replace(plan=plan)
        else:
            self.planned = Pass(plan, self._settings(plan, shape))
        self.canvas.send(plan, self.planned.settings.shape)
        return self.planned

    def _step(self, settings: StepSettings) -> None:
        """Begin the pass."""
        if self.wait is not None:
            self.wait()
        step = partial(decode_step, self.model, self.canvas, settings, self.process, self.choose)
        with self.lock, device_of(self.canvas):
            if self.steps is None:
                step()
            else:
                self.steps.run(self.canvas, settings, step)

    def _settings(self, plan: Plan, shape: Shape) -> StepSettings:
        """Of the step that makes this pass."""
        canvas, count, seen, is_captured = self.canvas, shape.rows, shape.seen, self.steps is not None
        if is_captured:  # few shapes, so that graphs are found again
            shape = bucketed(shape, canvas.slots, canvas.width, self.config.block_length)
        if canvas.cache is not None:  # tokens know their rows, however those lie
            return StepSettings(shape, False, False, False, *self.fixed)
        is_in_order = (
            count == shape.rows == canvas.slots if is_captured else bool((plan.slot == np.arange(count)).all())
        )
        is_alike = (shape.rows, shape.seen) == (count, seen) and bool((plan.seen == seen).all())
        is_aligned = not is_captured and bool((plan.start == plan.start[0]).all())
        return StepSettings(shape, is_in_order, is_alike, is_aligned, *self.fixed)

    def _begin_again_with_fewer_slots(self, error):
        """Rows that do not fit on the device begin once more, half as many at a time."""
        slots = self.layout.slots // 2
        if slots == 0 or self.schedule.is_in_step or self.streamer is not None or self.conversation is not None:
            raise error
        logger.warning(f"Out of memory with {self.layout.slots} rows at the same time: decoding goes on with {slots}.")
        rows = self.rows
        unfinished = np.flatnonzero(rows.is_taken).tolist()
        ids = self.canvas.ids.tolist()
        self.waiting.extendleft(
            Prompt(int(rows.request[slot]), ids[slot][: rows.prompt_length[slot]], int(rows.length[slot]))
            for slot in reversed(unfinished)
        )
        self.canvas = None  # before there is another
        torch.cuda.empty_cache()
        self.layout = self.layout._replace(slots=slots)
        self._take_canvas()

    def _stop(self):
        """End rows whose time is over, and those that a stopping criterion ends."""
        rows = self.rows
        self.is_late = any(clock(torch.empty(1, 0), None).any() for clock in self.clocks)
        if self.is_late:
            rows.retire(np.flatnonzero(rows.is_live & (rows.passes == 0)))  # they have just come, and have not begun
            live = np.flatnonzero(rows.is_live)
            rows.finish(live, rows.decided[live])
        if self.criteria is None or not rows.is_changed:
            return
        is_closed = rows.is_taken & (rows.is_finished | rows.is_complete)
        if self.schedule.is_in_step and not is_closed[rows.is_taken].all():
            return
        slots = np.flatnonzero(is_closed)
        if not len(slots):
            return
        ends = self.criteria(self.canvas, rows, slots)
        is_earlier = ends < np.where(rows.is_finished[slots], rows.end[slots], rows.stop[slots] + 1)
        rows.finish(slots[is_earlier], ends[is_earlier])

    def _stream(self):
        if self.streamer is None:
            return
        rows, is_finished = self.rows, self.rows.is_finished[0]
        places = (rows.start, rows.stop, rows.decided, rows.end)
        start, stop, decided, end = (int(place[0] - rows.prompt_length[0]) for place in places)
        if is_finished:
            decided = end
        elif self.criteria is not None and not rows.is_complete[0]:
            decided = start  # a criterion may still cut inside the block
        answer = self.canvas.ids[0, rows.prompt_length[0] :]
        if decided > self.streamed:
            self.streamer.put(answer[self.streamed : decided].cpu())
            self.streamed = decided
        if hasattr(self.streamer, "put_draft") and not is_finished and self.streamed < stop:
            self.streamer.put_draft(value=answer[self.streamed : stop].cpu())

    def _retire(self):
        """A list with the answers of rows that have ended, if any; those that are kept in step end together."""
        rows, canvas = self.rows, self.canvas
        if not rows.is_finished.any() or (self.schedule.is_in_step and rows.is_live.any()):
            return []
        ended = np.flatnonzero(rows.is_finished)
        state, device = canvas.unload(ended.tolist(), self.device_of_answers), canvas.state.device
        arrived = None if state.device == device else torch.cuda.current_stream(device).record_event()
        answers = Answers(
            rows.request[ended], rows.prompt_length[ended], rows.end[ended], rows.passes[ended], state, arrived
        )
        rows.retire(ended)
        return [answers]

    def _keep(self):
        """For the next turn: the complete blocks of each row whose keys and values are final."""
        rows, length = self.rows, self.config.block_length
        kept = np.minimum(rows.kept, rows.end // length * length).tolist()
        ids = self.canvas.ids[: len(kept)].tolist()
        self.conversation.keep(self.canvas.cache, [row[:end] for row, end in zip(ids, kept, strict=True)])


def bucketed(shape: Shape, slots: int, width: int, block_length: int) -> Shape:
    """The next larger of the few shapes that steps are captured for, on a canvas of that many slots and columns."""
    rows, tokens, block = shape.rows, shape.tokens, min(power_of_2(shape.block), block_length)
    rows = min(_multiple(rows, ROW_BUCKET) if rows > ROW_BUCKET else power_of_2(rows), slots)
    if not tokens:
        return Shape(rows, min(_multiple(shape.seen, WIDTH_BUCKET), width), block, 0, 0)
    longest = power_of_2(shape.longest) if shape.longest <= MAX_TILE else width
    tokens = _multiple(tokens, max(TOKEN_BUCKET, power_of_2(tokens) // 8))
    return Shape(rows, width, block, tokens, longest)


def _multiple(number, step):
    return -(-number // step) * step


def device_of(canvas: Canvas):
    """A context in which kernels are launched on the device of a canvas."""
    return torch.cuda.device(canvas.layout.device) if canvas.layout.device.type == "cuda" else nullcontext()
