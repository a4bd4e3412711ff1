# SPDX-License-Identifier: Apache-2.0; dparallel 0.2.0
"""Which logits processors decoding takes, and how it calls them.

transformers' processors are written for one token after the other: they see the ids so far, and the logits of the next
token. Here they are called for each position of a block with the ids to its left, of which some may still be `[MASK]`.
"""

import torch
from transformers.generation import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

# Those that look at the logits of a position and at nothing else: they take all positions at once.
POSITIONWISE = (SuppressTokensLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)
# Those of transformers that are right whatever of the tokens to the left is decided: they ask how many there are, or
# whether one is among them. Words of several tokens are looked at apart.
OF_ANY_BLOCK = (
    *POSITIONWISE, EpsilonLogitsWarper, EtaLogitsWarper, ExponentialDecayLengthPenalty, ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor, LogitNormalization, MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper, NoBadWordsLogitsProcessor, RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor, TopHLogitsWarper, TypicalLogitsWarper,
)  # fmt: skip


def check_processors(processors: LogitsProcessorList | None, block_length: int) -> None:
    """Refuse those that need the tokens to the left to be decided; in blocks of one token, they are. A class of the
    user's own is taken for one that knows what it sees, unless it derives from one that does not.

    Raises:
        ValueError: naming the processor.
    """
    for processor in () if block_length == 1 else processors or ():
        kind = next((kind for kind in type(processor).__mro__ if kind.__module__.startswith("transformers.")), None)
        if kind in (None, LogitsProcessor):
            continue
        has_words = any(len(ids) > 1 for ids in getattr(processor, "sequence_bias", None) or ())
        if kind not in OF_ANY_BLOCK or has_words:
            needed = "words of one token" if has_words else "the tokens before a position to be decided"
            raise ValueError(
                f"`logits_processor` holds a {type(processor).__name__}, which needs {needed}: with "
                f"`block_length={block_length}`, that is not allowed. It is with `block_length=1`, where tokens are "
                f"written one after the other."
            )


def is_positionwise(processors: LogitsProcessorList) -> bool:
    """Do all of them look at the logits of a position and at nothing else?"""
    return all(type(processor) in POSITIONWISE for processor in processors)


def process_positions(processors: LogitsProcessorList, logits: torch.Tensor) -> torch.Tensor:
    """Logits (B, K, V) as processors leave them that look at those of a position and at nothing else, in float32."""
    return processors(None, logits.flatten(0, 1).float()).view(logits.shape)


def process_columns(
    processors: LogitsProcessorList, logits: torch.Tensor, ids: torch.Tensor, first: int
) -> torch.Tensor:
    """The logits (B, K, V) of blocks that all begin at the same column, as processors of any kind leave them, in
    float32.

    Args:
        processors (`LogitsProcessorList`): called for each position with the ids to its left and its logits.
        logits (`torch.Tensor` of shape `(B, K, V)`): that predict the blocks' positions.
        ids (`torch.LongTensor` of shape `(B, T)`): the rows.
        first (`int`): the column of `ids` where the blocks begin.
    """
    columns = [processors(ids[:, : first + k], logits[:, k].float()) for k in range(logits.shape[1])]
    return torch.stack(columns, dim=1)
