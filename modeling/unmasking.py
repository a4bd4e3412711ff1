# SPDX-License-Identifier: Apache-2.0; dparallel 0.2.0
"""The unmasking policies: which masked positions of the current block become final in this step.

Each policy is a pure function that returns (B, K) bool and picks at least one masked position of every row that has
one. A thresholded one is called `(statistics, masked, *, threshold)`, a scheduled one, which picks `count` positions,
`(statistics, masked, *, count, temperature, uniform)`. A new policy is one function and one line in the table at the
end.

Arguments: `statistics` (`TokenStatistics`); `masked` (B, K) bool; `threshold` (number or 0-d tensor); `count` (int, or
tensor (B, 1)); `temperature` (`float`); `uniform` (B, K), random numbers between 0 and 1, for what is drawn.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from .token_statistics import TokenStatistics


def best(score: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """The masked position of the highest score in each row, the first one of equals: (B, K) bool."""
    first = score.masked_fill(~masked, -torch.inf).argmax(dim=-1, keepdim=True)
    return torch.zeros_like(masked).scatter_(-1, first, True) & masked


def rank(score: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """0 for the masked position of the highest score in its row, then 1, 2, ...; what is not masked comes last."""
    order = score.masked_fill(~masked, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    # A masked score may itself be -inf: put what is not masked behind it.
    order = order.gather(-1, masked.gather(-1, order).argsort(dim=-1, descending=True, stable=True))
    return torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )


# --- thresholded: the number of tokens per step is free --------------------------------------------------------------


def confidence_threshold(
    statistics: TokenStatistics,
    masked: torch.Tensor,
    *,
    threshold: float | torch.Tensor,
    count: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Probability of at least `threshold`, or the most confident. Fast-dLLM, https://arxiv.org/abs/2505.22618. With a
    `count`, the most confident so many: SDAR's dynamic remasking, https://arxiv.org/abs/2510.06303."""
    confidence = statistics.confidence
    surest = best(confidence, masked) if count is None else rank(confidence, masked) < count
    return masked & ((confidence >= threshold) | surest)


def confidence_factor(
    statistics: TokenStatistics, masked: torch.Tensor, *, threshold: float | torch.Tensor
) -> torch.Tensor:
    """The longest run of the most confident in which the r-th has at least 1 - threshold / (r + 1); the first always
    passes. As in Fast-dLLM's code (https://arxiv.org/abs/2505.22618) a failure of the very last candidate goes
    unnoticed, so that all are taken."""
    ranks = rank(statistics.confidence, masked)
    bar = 1.0 - threshold / (ranks + 2.0)
    passes = (statistics.confidence >= bar) | (ranks == 0)
    failures = torch.where(masked & ~passes, ranks, ranks.shape[-1])
    taken = failures.amin(dim=-1, keepdim=True)
    candidates = masked.sum(dim=-1, keepdim=True)
    taken = torch.where(taken >= candidates - 1, candidates, taken)
    return masked & (ranks < taken)


def entropy_threshold(
    statistics: TokenStatistics, masked: torch.Tensor, *, threshold: float | torch.Tensor
) -> torch.Tensor:
    """Entropy of at most `threshold` nats, or the lowest. dParallel, https://arxiv.org/abs/2509.26488."""
    return masked & (statistics.entropy <= threshold) | best(-statistics.entropy, masked)


def entropy_bound(
    statistics: TokenStatistics, masked: torch.Tensor, *, threshold: float | torch.Tensor
) -> torch.Tensor:
    """The positions of lowest entropy, as long as the entropies *before* each add up to at most `threshold` nats.
    EB sampler, https://arxiv.org/abs/2505.24857."""
    ranks = rank(-statistics.entropy, masked)
    in_order = torch.zeros_like(statistics.entropy).scatter_(-1, ranks, statistics.entropy.masked_fill(~masked, 0.0))
    before = in_order.cumsum(dim=-1) - in_order
    return masked & (before.gather(-1, ranks) <= threshold) | best(-statistics.entropy, masked)


def learned_filter(
    statistics: TokenStatistics, masked: torch.Tensor, *, threshold: float | torch.Tensor
) -> torch.Tensor:
    """Final with a probability above `threshold`, by a learned filter, or the most confident. Learn2PD,
    https://arxiv.org/abs/2509.25188."""
    is_final = statistics.finality > threshold  # type: ignore[operator]
    return masked & is_final | best(statistics.confidence, masked)


# --- scheduled: the number per step is given, the order goes by certainty --------------------------------------------


def most(
    score: torch.Tensor,
    masked: torch.Tensor,
    count: int | torch.Tensor,
    temperature: float,
    uniform: torch.Tensor | None,
) -> torch.Tensor:
    """The `count` masked positions of highest score. At a temperature above 0 they are drawn one after the other in
    proportion to softmax(score / temperature), as in Dream's code (`alg_temp`): noise makes the order such a draw
    (Kool et al., https://arxiv.org/abs/1903.06059)."""
    if temperature:
        score = score / temperature - (-uniform.log()).log()  # type: ignore[union-attr]
    return masked & (rank(score, masked) < count)


def confidence(
    statistics: TokenStatistics,
    masked: torch.Tensor,
    *,
    count: int | torch.Tensor,
    temperature: float = 0.0,
    uniform: torch.Tensor | None = None,
) -> torch.Tensor:
    """The `count` most confident. LLaDA's low-confidence remasking, https://arxiv.org/abs/2502.09992."""
    return most(statistics.confidence, masked, count, temperature, uniform)


def entropy(
    statistics: TokenStatistics,
    masked: torch.Tensor,
    *,
    count: int | torch.Tensor,
    temperature: float = 0.0,
    uniform: torch.Tensor | None = None,
) -> torch.Tensor:
    """The `count` of lowest entropy. Dream, https://arxiv.org/abs/2508.15487."""
    return most(-statistics.entropy, masked, count, temperature, uniform)


def margin(
    statistics: TokenStatistics,
    masked: torch.Tensor,
    *,
    count: int | torch.Tensor,
    temperature: float = 0.0,
    uniform: torch.Tensor | None = None,
) -> torch.Tensor:
    """The `count` of largest margin between the two best tokens. Dream, https://arxiv.org/abs/2508.15487."""
    return most(statistics.margin, masked, count, temperature, uniform)


def random(
    statistics: TokenStatistics,
    masked: torch.Tensor,
    *,
    count: int | torch.Tensor,
    temperature: float = 0.0,
    uniform: torch.Tensor | None = None,
) -> torch.Tensor:
    """Any `count`, uniformly."""
    return most(uniform, masked, count, 0.0, None)  # type: ignore[arg-type]


def leftmost(
    statistics: TokenStatistics,
    masked: torch.Tensor,
    *,
    count: int | torch.Tensor,
    temperature: float = 0.0,
    uniform: torch.Tensor | None = None,
) -> torch.Tensor:
    """The `count` that come first in the text. SDAR's sequential remasking, https://arxiv.org/abs/2510.06303."""
    return masked & (masked.cumsum(dim=-1) <= count)


def even_schedule(
    masks: int, steps: int, *, eps: float | None = None, generator: torch.Generator | None = None
) -> list[int]:
    """`masks` positions in `steps` steps, as evenly as possible, the larger parts first; no step without a position.
    LLaDA, https://arxiv.org/abs/2502.09992."""
    return [count for i in range(steps) if (count := masks // steps + (i < masks % steps))]


def _shares(steps, eps):
    """With t going from 1 to `eps` in `steps` equal parts, the share 1 - t[i+1] / t[i] of what is left that step i
    writes; the last step writes the rest."""
    times = torch.linspace(1, eps, steps + 1)
    return [*(1 - times[1:-1] / times[:-2]), 1.0]


def linear_time_schedule(
    masks: int, steps: int, *, eps: float = 1e-3, generator: torch.Generator | None = None
) -> list[int]:
    """Each step writes its share of what is left, rounded down; steps that would write nothing are left out. Dream,
    https://arxiv.org/abs/2508.15487."""
    counts = []
    for share in _shares(steps, eps):
        counts.append(int(masks * share))
        masks -= counts[-1]
    return [count for count in counts if count]


def ancestral_schedule(
    masks: int, steps: int, *, eps: float = 1e-3, generator: torch.Generator | None = None
) -> list[int]:
    """Each step writes each position with its share as the probability: with `unmasking="random"` this is the reverse
    process of masked diffusion, Dream's `origin`. Dream, https://arxiv.org/abs/2508.15487."""
    counts = []
    for share in _shares(steps, eps):
        draws = torch.rand(masks, generator=generator, device=None if generator is None else generator.device)
        counts.append(int((draws < share).sum()))
        masks -= counts[-1]
    return [count for count in counts if count]


class Policy(NamedTuple):
    """`select` is the function. A thresholded policy has a default threshold and the closed range of its values; a
    scheduled one has none. `is_drawn`: it needs random numbers whatever the temperature. `takes_count`: though it is
    thresholded, it may be told how many tokens to write at least."""

    select: Callable
    default: float | None = None
    low: float = 0.0
    high: float = float("inf")
    low_is_allowed: bool = True
    is_drawn: bool = False
    takes_count: bool = False

    @property
    def is_scheduled(self) -> bool:
        return self.default is None

    def allows(self, threshold: float) -> bool:
        return self.low <= threshold <= self.high and (self.low_is_allowed or threshold > self.low)

    @property
    def range(self) -> str:
        low = f"at least {self.low:g}" if self.low_is_allowed else f"above {self.low:g}"
        return low if self.high == float("inf") else f"{low} and at most {self.high:g}"


POLICIES = {
    "confidence_threshold": Policy(confidence_threshold, default=0.9, high=1.0, takes_count=True),
    "confidence_factor": Policy(confidence_factor, default=1.0, low_is_allowed=False),
    "entropy_threshold": Policy(entropy_threshold, default=0.5),
    "entropy_bound": Policy(entropy_bound, default=0.1, low_is_allowed=False),
    "learned_filter": Policy(learned_filter, default=0.96, high=1.0),
    "confidence": Policy(confidence),
    "entropy": Policy(entropy),
    "margin": Policy(margin),
    "random": Policy(random, is_drawn=True),
    "leftmost": Policy(leftmost),
}
SCHEDULES = {"even": even_schedule, "linear_time": linear_time_schedule, "ancestral": ancestral_schedule}
