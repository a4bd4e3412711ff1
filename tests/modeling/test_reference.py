"""Decoding, written down once more as the papers have it: one row at a time, in float64, with nothing of the engine
but the model's forward pass. 20,000 rows that join and leave a batch agree with it."""

import math

import numpy as np
import pytest
import torch

from tests.families import FAMILIES
from tests.modeling.test_captured_step import prompts
from tests.modeling.test_generation import EOS, MASK

ANSWER, BLOCK, NEAR = 14, 6, 5e-6
SETTINGS = [
    {"unmasking": "confidence_threshold", "threshold": 0.3},
    {"unmasking": "confidence_factor", "threshold": 1.6},
    {"unmasking": "entropy_threshold", "threshold": 1.5},
    {"unmasking": "entropy_bound", "threshold": 2.5},
    {"unmasking": "confidence", "steps": 8},
    {"unmasking": "entropy", "steps": 7, "schedule": "linear_time"},
    {"unmasking": "margin", "steps": 14},
    {"unmasking": "entropy_threshold", "threshold": 1.5, "stop_at_eos": False},
    {"unmasking": "confidence_threshold", "threshold": 0.3, "block_length": 14},
    {"unmasking": "confidence_threshold", "threshold": 0.5, "eos_threshold": 0.05},
]


class SlowRow:
    """One prompt and its answer. `near` is how close the closest of all decisions was."""

    def __init__(self, prompt, settings, eos):
        self.settings, self.eos, self.start = settings, eos, len(prompt)
        self.ids = prompt + [MASK] * ANSWER
        self.length, self.nfe, self.near, self.step = settings.get("block_length", BLOCK), 0, math.inf, 0
        self.end, self.stops = len(self.ids), settings.get("stop_at_eos", True)

    def advance(self):
        """To the next block, while nothing of this one is masked. Returns whether there is anything left to do."""
        while self.start < self.end:
            block = range(self.start, min(self.start + self.length, self.end))
            text = self.ids[block.start : next((i for i in block if self.ids[i] == MASK), block.stop)]
            if self.stops and any(token in self.eos for token in text):
                return False
            if any(self.ids[i] == MASK for i in block):
                return True
            self.start, self.step = self.start + self.length, 0
        return False

    def write(self, probabilities):
        """What a pass writes, by the probabilities (T, V) of the token at each place."""
        self.nfe += 1
        masked = [i for i in range(self.start, min(self.start + self.length, self.end)) if self.ids[i] == MASK]
        tokens, confidence, entropy, margin = {}, {}, {}, {}
        for i in masked:
            entropy[i] = -sum(p * math.log(p) for p in probabilities[i] if p > 0)
            allowed = np.delete(probabilities[i], MASK)  # the last id
            first, second = np.argsort(-allowed, kind="stable")[:2]
            tokens[i], confidence[i], margin[i] = int(first), allowed[first], allowed[first] - allowed[second]
            self.near = min(self.near, margin[i])
        chosen = self.choose(masked, confidence, entropy, margin)
        if "eos_threshold" in self.settings:
            bar = self.settings["eos_threshold"]
            ends = [i for i in masked if tokens[i] in self.eos]
            self.near = min([self.near, *(abs(confidence[i] - bar) for i in ends)])
            ends = [i for i in ends if i in chosen or confidence[i] >= bar]
            if ends:
                self.end = min(self.end, ends[0] + 1)
                chosen = {i for i in chosen | {ends[0]} if i < self.end}
        for i in chosen:
            self.ids[i] = tokens[i]
        self.step += 1

    def choose(self, masked, confidence, entropy, margin):
        name, bar = self.settings["unmasking"], self.settings.get("threshold")
        score = {"confidence": confidence, "margin": margin}.get(name.split("_")[0], entropy)
        order = sorted(masked, key=lambda i: score[i] if score is entropy else -score[i])
        values = [score[i] for i in order]
        self.near = min([self.near, *np.abs(np.diff(values))])
        if name == "confidence_factor":
            bars = [1 - bar / (rank + 1) for rank in range(1, len(order) + 1)]
            self.near = min([self.near, *(abs(c - b) for c, b in zip(values, bars, strict=True))])
            count = next((r for r in range(1, len(order)) if values[r] < bars[r]), len(order))
            return set(order if count == len(order) - 1 else order[:count])
        if name == "entropy_bound":
            before = np.cumsum([0.0, *values[:-1]])
            self.near = min([self.near, *np.abs(before[1:] - bar)])
            return {i for i, total in zip(order, before, strict=True) if total <= bar}
        if bar is not None:
            self.near = min([self.near, *(abs(value - bar) for value in values)])
            return {order[0]} | {i for i in order if (score[i] <= bar if score is entropy else score[i] >= bar)}
        return set(order[: self.count(len(masked))])

    def count(self, left):
        """How many tokens a step writes: parts that are as equal as can be, or Dream's share of what is left."""
        blocks, size = math.ceil(ANSWER / self.length), min(self.length, len(self.ids) - self.start)
        block = (self.start - (len(self.ids) - ANSWER)) // self.length
        steps = self.settings["steps"] // blocks + (block < self.settings["steps"] % blocks)
        if self.settings.get("schedule") != "linear_time":
            return size // steps + (self.step < size % steps)
        times = np.linspace(1, 1e-3, steps + 1)
        while True:  # steps that would write nothing are no steps
            i = self.step
            count = left if i >= steps - 1 else int(left * (1 - times[i + 1] / times[i]))
            if count:
                return count
            self.step += 1


@torch.no_grad()
def slow_decode(model, rows):
    """Make passes until all rows are done, over those of the same length at the same time."""
    todo = [row for row in rows if row.advance()]
    while todo:
        by_length = {}
        for row in todo:
            by_length.setdefault(row.end, []).append(row)
        for end, group in by_length.items():
            ids = torch.tensor([row.ids[:end] for row in group])
            logits = model(ids).logits.roll(model.logits_shift, dims=1)
            for row, probabilities in zip(group, logits.softmax(dim=-1).numpy(), strict=True):
                row.write(probabilities)
        todo = [row for row in todo if row.advance()]


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_twenty_thousand_rows(family, settings):
    inputs, eos = prompts(1000, seed=21, longest=10), list(family.frequent)
    arguments = {"max_new_tokens": ANSWER, "block_length": BLOCK, "eos_token_id": eos, "pad_token_id": EOS} | settings
    outputs = family.load().generate_batch(inputs, max_batch_size=48, **arguments)
    rows = [SlowRow(prompt, settings, eos) for prompt in inputs]
    slow_decode(family.load().double(), rows)
    compared = 0
    for prompt, row, output in zip(inputs, rows, outputs.values(), strict=True):
        if row.near > NEAR:
            found = output.generated_tokens
            assert found == row.ids[len(prompt) : len(prompt) + len(found)], prompt
            assert output.num_forward_passes == row.nfe, prompt
            compared += 1
    assert compared > 0.98 * len(rows)
    assert len({row.nfe for row in rows}) > 1 or "steps" in settings


def test_some_rows():
    """The same for a few, in each run of the tests."""
    family, settings = FAMILIES["dream"], SETTINGS[2]
    inputs, eos = prompts(60, seed=22, longest=10), list(family.frequent)
    arguments = {"max_new_tokens": ANSWER, "block_length": BLOCK, "eos_token_id": eos, "pad_token_id": EOS} | settings
    rows = [SlowRow(prompt, settings, eos) for prompt in inputs]
    slow_decode(family.load().double(), rows)
    outputs = family.load().generate_batch(inputs, max_batch_size=7, **arguments)
    for prompt, row, output in zip(inputs, rows, outputs.values(), strict=True):
        found = output.generated_tokens
        assert (found, output.num_forward_passes) == (row.ids[len(prompt) : len(prompt) + len(found)], row.nfe)
