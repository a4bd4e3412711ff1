"""Losses of masked diffusion language models, as plain functions of logits. They are given row by row, and trainers
average them last, over all rows of an optimizer step: one batch of N rows, micro-batches of any sizes, and every split
over processes give the same gradient."""

import torch
from torch.nn import functional as F

from dparallel.modeling import TokenStatistics

LOSS_WEIGHTINGS = ("inverse_t", "uniform", "token")


def masked_diffusion_losses(
    logits: torch.Tensor,
    labels: torch.Tensor,
    masked: torch.Tensor,
    mask_ratio: torch.Tensor,
    span_length: torch.Tensor,
    loss_weighting: str = "inverse_t",
) -> torch.Tensor:
    """Cross-entropy on masked tokens.

    `"inverse_t"` sums it, divided by t and by the span's length: LLaDA's objective, a bound on the negative
    log-likelihood per token (https://arxiv.org/abs/2502.09992, algorithm 2). `"uniform"` is its mean over the row's
    masked tokens (0 if there are none), which weighs all t alike. `"token"` is its sum over the span's length, so
    that every masked token weighs alike, and heavily masked rows, as decoding begins with, weigh most.

    Args:
        logits (`torch.FloatTensor` of shape `(B, T, V)`): row i predicts labels i; float32.
        labels (`torch.LongTensor` of shape `(B, T)`): the true tokens.
        masked (`torch.BoolTensor` of shape `(B, T)`): the positions that count.
        mask_ratio (`torch.FloatTensor` of shape `(B,)`, or `(B, T)` for each position): t in (0, 1].
        span_length (`torch.LongTensor` of shape `(B,)`): number of tokens that could have been masked (the response).
        loss_weighting (`str`): one of `LOSS_WEIGHTINGS`.

    Returns:
        The losses of the rows, (B,).
    """
    losses = cross_entropies(logits, labels).masked_fill(~masked, 0.0)
    if loss_weighting == "uniform":
        return row_means(losses, masked)
    if loss_weighting == "inverse_t":
        losses = losses / mask_ratio.view(len(losses), -1)
    return losses.sum(dim=1) / span_length


def certainty_forcing_losses(
    logits: torch.Tensor, labels: torch.Tensor, masked: torch.Tensor, temperature: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two losses of "dParallel" (https://arxiv.org/abs/2509.26488, section 3.2), row by row.

    Args:
        logits (`torch.FloatTensor` of shape `(B, T, V)`): row i predicts labels i; float32.
        labels (`torch.LongTensor` of shape `(B, T)`): the tokens of the teacher's answer.
        masked (`torch.BoolTensor` of shape `(B, T)`): the positions that count.
        temperature (`float`): of the entropy, above 0. Below 1 it sharpens the distribution that is measured, so that
            the gradient goes to the tokens in doubt rather than to those that are almost certain.

    Returns:
        Two tensors (B,): the mean cross-entropy over a row's masked tokens, and the mean entropy of
        softmax(logits / temperature), in nats, over those of them whose likeliest token already is the label; 0 where
        there are none.
    """
    log_probs = (logits / temperature).log_softmax(dim=-1)
    entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
    is_right = masked & (logits.argmax(dim=-1) == labels)
    return row_means(cross_entropies(logits, labels), masked), row_means(entropy, is_right)


def certainty_forcing_loss(
    logits: torch.Tensor, labels: torch.Tensor, masked: torch.Tensor, temperature: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """`certainty_forcing_losses`, averaged over the rows: (trajectory loss, certainty loss), two scalars."""
    trajectory, certainty = certainty_forcing_losses(logits, labels, masked, temperature)
    return trajectory.mean(), certainty.mean()


def cross_entropies(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of each token: (B, T, V), (B, T) -> (B, T)."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)


def row_means(values: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """The mean of the counted ones in each row, 0 where there are none: (B, T), (B, T) bool -> (B,)."""
    return values.masked_fill(~counted, 0.0).sum(dim=1) / counted.sum(dim=1).clamp(min=1)


def prediction_metrics(
    statistics: TokenStatistics, labels: torch.Tensor, masked: torch.Tensor
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What a model thinks at masked tokens: name -> (sum over each row (B,), number of tokens (B,)).

    `masked_accuracy`: the share whose likeliest token is right; `mean_confidence`: its probability; `mean_entropy`: in
    nats. `statistics` is `TokenStatistics` of (B, T).
    """
    values = {
        "masked_accuracy": statistics.token == labels,
        "mean_confidence": statistics.confidence,
        "mean_entropy": statistics.entropy,
    }
    return {name: (value.float().masked_fill(~masked, 0.0).sum(1), masked.sum(1)) for name, value in values.items()}
