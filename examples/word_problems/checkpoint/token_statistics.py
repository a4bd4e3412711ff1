# SPDX-License-Identifier: Apache-2.0; dparallel 0.2.0
"""From logits to what the unmasking policies look at: a token for each position, and how certain the model is."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from .triton_kernels import fused_token_statistics, kernel_or_plain, suit_kernels


class TokenStatistics(NamedTuple):
    """Per position, each of shape (B, K).

    `token` is the choice (int64). `confidence` is its probability, `entropy` that of the whole distribution in nats,
    `margin` the probability of the best token less that of the second best; all float32, all of the distribution
    before temperature, top-k and top-p. `finality` is the probability, by a learned filter, that the choice is final
    (`unmasking_filter.py`); None without one.
    """

    token: torch.Tensor
    confidence: torch.Tensor
    entropy: torch.Tensor
    margin: torch.Tensor
    finality: torch.Tensor | None = None


def token_statistics(
    logits: torch.Tensor, mask_token_id: int, warpers: Callable | None = None, uniform: torch.Tensor | None = None
) -> TokenStatistics:
    """Choose a token for every position and measure the model's certainty.

    `[MASK]` is never chosen (the published loops run for ever where it is the likeliest token), while probabilities
    stay those over the full vocabulary. Arithmetic is float32 whatever the dtype of the logits; the published LLaDA
    code takes float64, at a large cost and with the same decisions.

    Args:
        logits (`torch.Tensor` of shape `(B, K, V)`): unshifted or shifted, but row i must predict position i.
        mask_token_id (`int`): id of `[MASK]`.
        warpers (callable `(ids, scores (N, V)) -> scores`, *optional*): temperature, top-k, ... of a sampled choice.
            `None` takes the likeliest token, the first one of equals.
        uniform (`torch.FloatTensor` of shape `(B, K)`, *optional*): random numbers between 0 and 1, one for each
            sampled choice.
    """
    plain = partial(plain_token_statistics, warpers=warpers, uniform=uniform)
    suits = warpers is None and suit_kernels(logits)
    return TokenStatistics(*kernel_or_plain(suits, fused_token_statistics, plain, logits, mask_token_id))


def plain_token_statistics(
    logits: torch.Tensor, mask_token_id: int, warpers: Callable | None = None, uniform: torch.Tensor | None = None
) -> TokenStatistics:
    log_probs = logits.float().log_softmax(dim=-1)
    entropy = torch.special.entr(log_probs.exp()).sum(dim=-1)
    log_probs[..., mask_token_id] = -torch.inf
    # Not topk, which leaves open which of equal values comes first, and takes its time.
    best, token = log_probs.max(dim=-1)
    second = log_probs.scatter(-1, token[..., None], -torch.inf).amax(dim=-1)
    if warpers is not None:
        probs = warpers(None, log_probs.flatten(0, 1)).softmax(dim=-1).view_as(log_probs)
        # The first token up to which their sum is above the random share of the whole: one of probability above 0.
        sums = probs.cumsum(dim=-1)
        token = (sums <= uniform[..., None] * sums[..., -1:]).sum(dim=-1)  # type: ignore[index]
    confidence = log_probs.gather(-1, token[..., None])[..., 0].exp()
    return TokenStatistics(token, confidence, entropy, best.exp() - second.exp())
