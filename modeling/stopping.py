# SPDX-License-Identifier: Apache-2.0; dparallel 0.2.0
"""Where stopping criteria end a row. They are written for one token after the other, so they are asked once a block is
complete, for every length inside it: a row ends where decoding token by token would have ended it."""

from collections.abc import Callable

import numpy as np
import torch
from transformers import StopStringCriteria
from transformers.generation import StoppingCriteriaList

from .block_schedule import Rows
from .canvas import Canvas

NEVER = np.iinfo(np.int64).max


def last_columns(rows: Rows, slots: np.ndarray) -> np.ndarray:
    """Behind which the decided text of these rows' blocks has its last token, (N,)."""
    return np.where(rows.is_finished[slots], rows.end[slots], rows.stop[slots])


def ends_by_strings(criterion: StopStringCriteria, canvas: Canvas, rows: Rows, slots: np.ndarray) -> np.ndarray:
    """Of each of these rows (N,) the column behind the first stop string in its block, `NEVER` without one. The
    criterion looks at the last tokens of a text, so all lengths of all rows are asked for at once."""
    width, device = criterion.maximum_token_len, canvas.ids.device
    start, last = (torch.from_numpy(each).to(device) for each in (rows.start[slots], last_columns(rows, slots)))
    lengths = start[:, None] + 1 + torch.arange(max(int((last - start).max()), 0), device=device)
    columns = lengths[..., None] - width + torch.arange(width, device=device)
    ids = canvas.ids[torch.from_numpy(slots).to(device)[:, None, None], columns.clamp(0, canvas.width)]
    ids = ids.masked_fill(columns < 0, canvas.layout.mask_token_id)
    stops = criterion(ids.flatten(0, 1), None).to(device).view(lengths.shape) & (lengths <= last[:, None])
    return (
        torch.where(stops, lengths, NEVER).amin(dim=1).cpu().numpy() if lengths.numel() else np.full(len(slots), NEVER)
    )


def ends_row_by_row(criteria: StoppingCriteriaList, canvas: Canvas, rows: Rows, slots: np.ndarray) -> np.ndarray:
    """The same for criteria of any kind, which see one row (1, L) at a time."""
    ends = np.full(len(slots), NEVER)
    for i, (slot, last) in enumerate(zip(slots, last_columns(rows, slots), strict=True)):
        lengths = range(rows.start[slot] + 1, last + 1)
        ends[i] = next(
            (length for length in lengths if criteria(canvas.ids[slot : slot + 1, :length], None).any()), NEVER
        )
    return ends


def ends_in_step(
    criteria: StoppingCriteriaList, canvas: Canvas, rows: Rows, slots: np.ndarray, prompts: torch.Tensor
) -> np.ndarray:
    """The same for rows that are kept in step: criteria see all of them (B, L), with the padding of their `prompts`
    (B, P). `slots` are all rows, in order."""
    prompt_length, ends = rows.prompt_length[slots], np.full(len(slots), NEVER)
    view = padded_view(canvas, rows, prompts)
    last = last_columns(rows, slots) - prompt_length
    start, stop = (int((place[slots] - prompt_length).max()) for place in (rows.start, rows.stop))
    for length in range(start + 1, stop + 1):
        stops = criteria(view[:, : prompts.shape[1] + length], None).cpu().numpy() & (length <= last)
        ends = np.where(stops & (ends == NEVER), prompt_length + length, ends)
    return ends


def padded_view(canvas: Canvas, rows: Rows, prompts: torch.Tensor) -> torch.Tensor:
    """The rows of a canvas behind prompts (B, P) that are padded on the left, as `generate()` returns them: (B, P +
    G). Row i of the prompts stands in slot i, and answers are equally long."""
    count = len(prompts)
    starts = torch.from_numpy(rows.prompt_length[:count]).to(canvas.ids.device)
    columns = starts[:, None] + canvas.offsets[: int(rows.length[:count].max(initial=0))]
    return torch.cat((prompts, canvas.ids[:count].gather(1, columns)), dim=1)


def merge_ends(*parts: Callable) -> Callable:
    """Of several such functions of `(canvas, rows, slots)`: whichever ends a row first."""
    return lambda *arguments: np.min([part(*arguments) for part in parts], axis=0)
