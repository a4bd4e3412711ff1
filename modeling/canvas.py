"""The canvas: prompts, answers as far as they are written, and what is known of each position and row."""

import torch

from .block_cache import BlockCache

# What a Canvas holds for each row, and what of it is left when the row has ended.
ROW_RESULTS = ("ids", "end", "num_passes", "unmasking_step", "unmasking_confidence")
ROW_STATE = (*ROW_RESULTS, "attention_mask", "position_ids", "undecided", "reach", "finished")


class Canvas:
    """The state of one decoding. Tensors stay on the device; `look` brings the little that the loop decides by to the
    host, once a step.

    Attributes (B rows, prompts of P and answers of G tokens):
        ids (B, P + G): the canvas; position_ids: the same shape, or None for 0, 1, ...
        attention_mask (B, P + G): 0 at keys nobody attends to, or None.
        cache: keys and values of the canvas (`BlockCache`), or None.
        undecided (B, G): positions that are still to be written.
        end (B,): length of the answer; G until a row ends earlier.
        reach (B,): part of the answer that takes part in the computation; G unless an end-of-text was predicted.
        finished (B,): the row has ended.
        num_passes (B,), unmasking_step (B, G), unmasking_confidence (B, G): see DiffusionGenerationOutput.
        rows (B,): the numbers of these rows in the whole batch.
    """

    def __init__(self, input_ids, attention_mask, config):
        (batch_size, self.prompt_length), self.length = input_ids.shape, config.max_new_tokens
        self.eos = config._eos_token_tensor if config.stop_at_eos else None
        self.eos_threshold = config.eos_threshold
        answer = input_ids.new_full((batch_size, self.length), config.mask_token_id)
        self.ids = torch.cat((input_ids, answer), dim=1)
        self.attention_mask = self.position_ids = None
        if attention_mask is not None or self.eos_threshold is not None:
            prompt_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids)
            self.attention_mask = torch.cat((prompt_mask, torch.ones_like(answer)), dim=1)
        if attention_mask is not None:
            self.position_ids = (self.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        self.cache = None if config.block_cache == "none" else BlockCache(self.ids.shape[1])
        self.undecided = torch.ones_like(answer, dtype=torch.bool)
        self.end = answer.new_full((batch_size,), self.length)
        self.reach = self.end.clone()
        self.finished = torch.zeros_like(self.end, dtype=torch.bool)
        self.num_passes = torch.zeros_like(self.end)
        self.unmasking_step = torch.full_like(answer, -1)
        self.unmasking_confidence = torch.zeros_like(answer, dtype=torch.float32)
        self.rows = torch.arange(batch_size, device=answer.device)
        self.left = []

    @property
    def answer(self):
        return self.ids[:, self.prompt_length :]

    def write(self, block, statistics, accepted):
        """Make the accepted tokens of a block final, and end the rows that are done. `accepted` is (B, K) bool."""
        is_counted = self.undecided[:, block].any(dim=1)
        if self.eos_threshold is not None:
            accepted = self._accept_predicted_end(block, statistics, accepted)
        for values, new in (
            (self.answer, statistics.token),
            (self.unmasking_step, self.num_passes[:, None]),
            (self.unmasking_confidence, statistics.confidence),
        ):
            values[:, block] = torch.where(accepted, new, values[:, block])
        self.num_passes += is_counted
        self.undecided[:, block] &= ~accepted
        if self.eos is not None:
            self._finish_at_eos(block)

    def _accept_predicted_end(self, block, statistics, accepted):
        """End-of-Text Prediction: the first end-of-text of a row's block that the policy accepts, or that is likely
        enough, is written and becomes the row's reach."""
        ends = self.undecided[:, block] & torch.isin(statistics.token, self.eos)
        ends &= accepted | (statistics.confidence >= self.eos_threshold)
        self.reach = torch.where(ends.any(dim=1), block.start + ends.int().argmax(dim=1) + 1, self.reach)
        position = torch.arange(self.length, device=self.ids.device)
        is_reached = position < self.reach[:, None]
        self.undecided &= is_reached
        self.attention_mask[:, self.prompt_length :] = is_reached
        is_first = ends & (position[block] == self.reach[:, None] - 1)
        return (accepted | is_first) & self.undecided[:, block]

    def _finish_at_eos(self, block):
        """End the rows in which an end-of-text of the block stands with nothing undecided before it."""
        decided = (~self.undecided[:, block]).cumprod(dim=1).bool()
        ends = torch.isin(self.answer[:, block], self.eos) & decided
        first = block.start + ends.int().argmax(dim=1) + 1
        self.finish(torch.where(ends.any(dim=1), first, self.length + 1))

    def finish(self, end):
        """End each row at length `end` (B,), or not at all where that is beyond the canvas. The earliest counts."""
        self.end = torch.minimum(self.end, end)
        self.finished |= end <= self.length
        self.undecided &= ~self.finished[:, None]

    def look(self, block):
        """The step's one wait for the device. Returns whether the block still holds an undecided position, and lists
        over the rows: has it ended, and the length of its decided text; last the part of the answer that passes still
        have to cover."""
        first = torch.where(self.undecided.any(dim=1), self.undecided.int().argmax(dim=1), self.end)
        state = (self.undecided[:, block].any(dim=1), self.finished, torch.minimum(first, self.end), self.reach)
        is_open, finished, decided, reach = torch.stack([row.long() for row in state]).tolist()
        unfinished_reach = (length for length, ended in zip(reach, finished, strict=True) if not ended)
        return any(is_open), finished, decided, max(unfinished_reach, default=0)

    def let_leave(self, finished):
        """Go on without the rows that have ended (a list of bool), until `reunite`."""
        for_good = torch.tensor(finished, device=self.ids.device).bool()
        gone, staying = for_good.nonzero()[:, 0], (~for_good).nonzero()[:, 0]
        self.left.append((self.rows[gone], {name: getattr(self, name)[gone] for name in ROW_RESULTS}))
        self.rows = self.rows[staying]
        for name in ROW_STATE:
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name)[staying])
        if self.cache is not None:
            self.cache.select_rows(staying)

    def reunite(self):
        """Bring the results of all rows together again."""
        order = torch.cat([*(rows for rows, _ in self.left), self.rows]).argsort()
        for name in ROW_RESULTS:
            parts = [*(results[name] for _, results in self.left), getattr(self, name)]
            setattr(self, name, torch.cat(parts)[order])
