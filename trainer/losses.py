"""Losses of masked diffusion language models, as plain functions of logits. They are given row by row and averaged
last, so that one batch of N rows, N batches of one, and every split over processes give the same gradient."""

import torch
from torch.nn import functional as F

LOSS_WEIGHTINGS = ("inverse_t", "uniform", "token")


def masked_diffusion_losses(logits, labels, masked, mask_ratio, span_length, loss_weighting="inverse_t"):
    """Cross-entropy on masked tokens.

    `"inverse_t"` sums it, divided by t and by the span's length: LLaDA's objective, a bound on the negative
    log-likelihood per token (https://arxiv.org/abs/2502.09992, algorithm 2). `"uniform"` is its mean over the row's
    masked tokens (0 if there are none), which weighs all t alike. `"token"` is its sum over the span's length, so
    that every masked token weighs alike, and heavily masked rows, as decoding begins with, weigh most.

    Args:
        logits (`torch.FloatTensor` of shape `(B, T, V)`): row i predicts labels i; float32.
        labels (`torch.LongTensor` of shape `(B, T)`): the true tokens.
        masked (`torch.BoolTensor` of shape `(B, T)`): the positions that count.
        mask_ratio (`torch.FloatTensor` of shape `(B,)`): t in (0, 1].
        span_length (`torch.LongTensor` of shape `(B,)`): number of tokens that could have been masked (the response).
        loss_weighting (`str`): one of `LOSS_WEIGHTINGS`.

    Returns:
        The losses of the rows, (B,).
    """
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    row_sums = losses.view_as(labels).masked_fill(~masked, 0.0).sum(dim=1)
    denominators = {
        "inverse_t": mask_ratio * span_length,
        "uniform": masked.sum(dim=1).clamp(min=1),
        "token": span_length,
    }
    return row_sums / denominators[loss_weighting]


@torch.no_grad()
def prediction_metrics(logits, labels, masked):
    """Sums over the masked tokens of each row: right predictions, probabilities of the predicted token, and the number
    of tokens. (B, 3)"""
    best, prediction = logits.max(dim=-1)
    confidence = (best - logits.logsumexp(dim=-1)).exp()
    columns = ((prediction == labels) & masked, confidence.masked_fill(~masked, 0.0), masked)
    return torch.stack([column.sum(dim=1).float() for column in columns], dim=1)
