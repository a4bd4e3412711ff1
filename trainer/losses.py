"""Losses of masked diffusion language models, as plain functions of logits. Rows are averaged last, so that one batch
of N rows, N batches of one, and every split over processes give the same gradient."""

import torch
from torch.nn import functional as F

LOSS_WEIGHTINGS = ("inverse_t", "uniform")


def masked_diffusion_loss(logits, labels, masked, mask_ratio, response_length, loss_weighting="inverse_t"):
    """Cross-entropy on masked tokens.

    `"inverse_t"` sums it, divided by t and by the response length: LLaDA's objective, a bound on the negative
    log-likelihood per token (https://arxiv.org/abs/2502.09992, algorithm 2). `"uniform"` is its mean over the row's
    masked tokens (0 if there are none), which weighs all t alike.

    Args:
        logits (`torch.Tensor` of shape `(B, T, V)`): row i predicts labels i.
        labels (`torch.LongTensor` of shape `(B, T)`): the true tokens.
        masked (`torch.BoolTensor` of shape `(B, T)`): the positions that count.
        mask_ratio (`torch.FloatTensor` of shape `(B,)`): t in (0, 1].
        response_length (`torch.LongTensor` of shape `(B,)`): number of tokens that could have been masked.
        loss_weighting (`str`): `"inverse_t"` or `"uniform"`.

    Returns:
        The loss, a scalar: the mean over rows.
    """
    losses = F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
    row_sums = losses.masked_fill(~masked, 0.0).sum(dim=1)
    if loss_weighting == "inverse_t":
        rows = row_sums / mask_ratio / response_length
    else:
        rows = row_sums / masked.sum(dim=1).clamp(min=1)
    return rows.mean()


@torch.no_grad()
def prediction_metrics(logits, labels, masked):
    """Sums over the masked tokens: right predictions, probabilities of the predicted token, and their number. (3,)"""
    confidence, prediction = logits.float().softmax(dim=-1).max(dim=-1)
    right = (prediction == labels) & masked
    return torch.stack([right.sum().float(), confidence.masked_fill(~masked, 0.0).sum(), masked.sum().float()])
