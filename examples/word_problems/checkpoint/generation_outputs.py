# SPDX-License-Identifier: Apache-2.0; dparallel 0.2.0
"""What decoding gives."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus
from transformers.utils import ModelOutput, logging

from .canvas import taken_apart
from .decoding_loop import Answers, Prompt
from .generation_config_diffusion import DiffusionGenerationConfig

logger = logging.get_logger(__name__)


@dataclass
class DiffusionGenerationOutput(ModelOutput):
    """What `generate(return_dict_in_generate=True)` returns, for B rows, prompts of P and answers of G tokens.

    Args:
        sequences (`torch.LongTensor` of shape `(B, P + G)`): prompts and answers.
        num_forward_passes (`torch.LongTensor` of shape `(B,)`): NFE. A pass counts for a row if the row's current
            block still held a mask.
        tokens_per_forward (`torch.FloatTensor` of shape `(B,)`): TPF: tokens of the answer up to and including the
            first end-of-text, over the NFE.
        unmasking_step (`torch.LongTensor` of shape `(B, G)`): the row's pass (0, 1, ...) after which each position was
            written, -1 if never.
        unmasking_confidence (`torch.FloatTensor` of shape `(B, G)`): probability of the token when it was written, 0
            if never.
    """

    sequences: torch.LongTensor | None = None
    num_forward_passes: torch.LongTensor | None = None
    tokens_per_forward: torch.FloatTensor | None = None
    unmasking_step: torch.LongTensor | None = None
    unmasking_confidence: torch.FloatTensor | None = None

    @property
    def num_tokens(self) -> torch.LongTensor:
        """Tokens of each answer up to and including the first end-of-text, (B,)."""
        return (self.tokens_per_forward * self.num_forward_passes).round().long()  # type: ignore[operator]


@dataclass
class DiffusionRequestOutput(GenerationOutput):
    """What `generate_batch()` gives for one request: transformers' own output, with what decoding counts of a row.

    Attributes:
        request_id (`str`): `"req_3"` for the prompt of index 3; further answers to it are `"req_3__child#0"`, ...
        prompt_ids (list of `int`): the prompt, P tokens.
        generated_tokens (list of `int`): the answer, up to and including its end-of-text.
        status (`RequestStatus`): `FINISHED`, or `FAILED` with an `error`.
        error (`str`, *optional*): why the request has no answer.
        index (`int`): of the prompt among all.
        num_forward_passes (`int`): NFE.
        tokens_per_forward (`float`): TPF: generated tokens over the NFE.
        unmasking_step (list of `int`): for each generated token the row's pass (0, 1, ...) after which it was written.
        unmasking_confidence (list of `float`): the probability of each generated token when it was written.
    """

    index: int = 0
    num_forward_passes: int = 0
    tokens_per_forward: float = 0.0
    unmasking_step: list[int] = field(default_factory=list)
    unmasking_confidence: list[float] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer up to and including the first end-of-text."""
        return round(self.tokens_per_forward * self.num_forward_passes)


def request_id(request: int, count: int) -> str:
    """The name of a request, where each prompt has `count` of them: as transformers names them."""
    index, number = divmod(request, count)
    return f"req_{index}" if number == count - 1 else f"req_{index}__child#{number}"


def failed_output(request: int, count: int, prompt_ids: list[int], error: str) -> DiffusionRequestOutput:
    """Of a request that has no answer, where each prompt has `count` of them."""
    return DiffusionRequestOutput(
        request_id(request, count),
        prompt_ids=prompt_ids,
        error=error,
        status=RequestStatus.FAILED,
        index=request // count,
    )


def to_outputs(
    part: Answers, begun: dict[int, Prompt], count: int, config: DiffusionGenerationConfig
) -> Iterator[DiffusionRequestOutput]:
    """The outputs of rows that have ended, which are taken from `begun`."""
    if part.arrived is not None:
        part.arrived.synchronize()
    ids, steps, confidences = (each.numpy() for each in taken_apart(part.state))
    text_ends = part.ends
    if not config.stop_at_eos:  # else they are behind the end-of-text
        columns = np.arange(ids.shape[1])
        is_end = np.isin(ids, _eos_of(config)) & (columns >= part.prompt_lengths[:, None])
        text_ends = np.minimum(np.where(is_end, columns + 1, part.ends[:, None]).min(axis=1), part.ends)
    is_broken = np.isnan(confidences[:, :-1]).any(axis=1)
    warn_of_broken_rows((part.requests[is_broken] // count).tolist())
    for i, request in enumerate(part.requests.tolist()):
        text, passes = slice(part.prompt_lengths[i], part.ends[i]), int(part.passes[i])
        yield DiffusionRequestOutput(
            request_id(request, count),
            prompt_ids=begun.pop(request).ids,
            generated_tokens=ids[i, text].tolist(),
            status=RequestStatus.FINISHED,
            index=request // count,
            num_forward_passes=passes,
            tokens_per_forward=int(text_ends[i] - part.prompt_lengths[i]) / max(passes, 1),
            unmasking_step=steps[i, text].tolist(),
            unmasking_confidence=confidences[i, text].tolist(),
        )


def _eos_of(config):
    """Ends of text, whether decoding stops at them or not."""
    eos = config.eos_token_id
    return [] if eos is None else eos if isinstance(eos, (list, tuple)) else [eos]


def warn_of_broken_rows(rows: list[int]) -> None:
    if rows:
        logger.warning(
            f"The logits of the rows {rows} were not numbers (NaN), so their answers mean nothing: the weights may be "
            f"broken, or float16 too small for this model; load it with dtype=torch.bfloat16 or torch.float32."
        )
