"""Which tokens of a training example are masked.

Randomness is a function of (seed, epoch, example id, position) and of nothing else, so that an example gets the same
masks whatever the micro-batch, the number of processes or the device, and after a resume. Hence no generator with a
state, but a hash of these numbers: the mixing function of SplitMix64 ("Fast splittable pseudorandom number
generators", Steele et al., 2014, https://doi.org/10.1145/2660193.2660195), whole batches at a time.
"""

from typing import NamedTuple

import torch

EVALUATION_EPOCH = -1  # evaluation sees the same masks each time
MIN_MASK_RATIO = 1e-3  # LLaDA's lower end of t: 1 / t must stay finite


def _mix(x):
    def shift_right(value, bits):  # torch shifts int64 arithmetically
        return (value >> bits) & ((1 << (64 - bits)) - 1)

    x = (x ^ shift_right(x, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ shift_right(x, 27)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ shift_right(x, 31)


def uniform_draws(seed: int, epoch: int, example_id: torch.LongTensor, count: int) -> torch.FloatTensor:
    """`count` numbers in [0, 1) for each example: (B,) -> (B, count). Asking for more leaves the first ones as they
    are."""
    key = torch.full_like(example_id, seed)
    for number in (epoch, example_id):
        key = _mix(key + (0x9E3779B97F4A7C15 - (1 << 64))) + number
    counter = torch.arange(1, count + 1, device=example_id.device) * (0x9E3779B97F4A7C15 - (1 << 64))
    bits = _mix(_mix(key)[:, None] + counter)
    return ((bits >> 40) & 0xFFFFFF).float() / 2**24


def response_mask(
    prompt_length: torch.LongTensor, attention_mask: torch.Tensor, logits_shift: int = 0
) -> torch.BoolTensor:
    """Positions that are learned: behind the prompt, and real. (B,), (B, T) -> (B, T) bool. Where the logits at i - 1
    predict token i (`logits_shift=1`), nothing predicts position 0."""
    position = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (position >= prompt_length.clamp(min=logits_shift)[:, None]) & attention_mask.bool()


class Masks(NamedTuple):
    """How a batch is masked.

    `hidden` (B, T) bool: shown to the model as `[MASK]`. `scored` (B, T) bool: hidden, and part of the loss. `ratio`
    (B,), or (B, T) where each block has its own: the probability with which each token of the span was hidden.
    `span_length` (B,): number of tokens that could have been scored.
    """

    hidden: torch.Tensor
    scored: torch.Tensor
    ratio: torch.Tensor
    span_length: torch.Tensor


def random_masks(
    response: torch.Tensor, grid: int | None = None, *, seed: int, epoch: int, example_id: torch.LongTensor
) -> Masks:
    """LLaDA's forward process: t ~ U(0, 1) for each row, then each response token is hidden with probability t. With a
    grid, each block has its own t (Block Diffusion, https://arxiv.org/abs/2503.09573, algorithm 1).

    Args:
        response (`torch.BoolTensor` of shape `(B, T)`): the tokens that are learned.
        grid (`int`, *optional*): tokens in a block, where blocks count from the row's first token.
        seed, epoch (`int`), example_id (`torch.LongTensor` of shape `(B,)`): see the module's docstring.
    """
    if grid is None:
        draws = uniform_draws(seed, epoch, example_id, 1 + response.shape[1])
        t, draws = draws[:, 0], draws[:, 1:]
    else:
        t, draws = _draws_by_blocks(response, grid, seed, epoch, example_id)
    ratio = MIN_MASK_RATIO + (1 - MIN_MASK_RATIO) * t
    hidden = response & (draws < ratio.view(len(ratio), -1))
    return Masks(hidden, hidden, ratio, response.sum(dim=1))


def blocks_of_columns(columns: torch.Tensor, grid: int | None) -> torch.Tensor:
    """The numbers of the blocks that the columns of rows lie in; without a grid, there is one."""
    return torch.zeros_like(columns) if grid is None else columns.div(grid, rounding_mode="floor")


def _draws_by_blocks(response, grid, seed, epoch, example_id):
    """A number for the block of each token and one for each token, (B, T) both. Two for each column are drawn, so that
    no number depends on how wide the batch is."""
    columns = torch.arange(response.shape[1], device=response.device)
    draws = uniform_draws(seed, epoch, example_id, 2 * response.shape[1])
    return draws[:, 1::2][:, blocks_of_columns(columns, grid) * grid], draws[:, 0::2]


def draw_block(response: torch.Tensor, block_length: int, draw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A block of each row's response, by numbers in [0, 1): (B, T) bool, int, (B,) -> the block and all that is behind
    it, (B, T) bool each. The last block may be shorter; none is empty."""
    blocks = response.sum(dim=1).add(block_length - 1).div(block_length, rounding_mode="floor")
    block = (draw * blocks).floor().long()
    block_of_token = (response.cumsum(dim=1) - 1).div(block_length, rounding_mode="floor")
    return response & (block_of_token == block[:, None]), response & (block_of_token > block[:, None])


def block_masks(
    response: torch.Tensor, block_length: int, *, seed: int, epoch: int, example_id: torch.LongTensor
) -> Masks:
    """What block-wise decoding sees: a block of the response is drawn uniformly, its tokens are hidden with
    probability t ~ U(0, 1) and scored, everything before it is shown, and everything behind it is hidden, unscored.

    Args: as `random_masks`; `block_length` is K, and the last block may be shorter.
    """
    draws = uniform_draws(seed, epoch, example_id, 2 + response.shape[1])
    ratio = MIN_MASK_RATIO + (1 - MIN_MASK_RATIO) * draws[:, 0]
    span, behind = draw_block(response, block_length, draws[:, 1])
    scored = span & (draws[:, 2:] < ratio[:, None])
    return Masks(scored | behind, scored, ratio, span.sum(dim=1))


def mixed_masks(
    response: torch.Tensor, block_length: int, *, seed: int, epoch: int, example_id: torch.LongTensor
) -> Masks:
    """`block_masks` for every second row on average, `random_masks` for the others."""
    randomness = {"seed": seed, "epoch": epoch, "example_id": example_id}
    is_block = uniform_draws(seed + 1, epoch, example_id, 1)[:, 0] < 0.5
    pairs = zip(block_masks(response, block_length, **randomness), random_masks(response, **randomness), strict=True)
    return Masks(*(torch.where(is_block[:, None] if a.ndim == 2 else is_block, a, b) for a, b in pairs))


def complementary_masks(
    response: torch.Tensor,
    block_length: int | None = None,
    mask_ratio: tuple[float, float] = (0.5, 0.5),
    unmasking_step: torch.LongTensor | None = None,
    grid: int | None = None,
    *,
    seed: int,
    epoch: int,
    example_id: torch.LongTensor,
) -> Masks:
    """dParallel's two views of each example, which together score every token of a span once
    (https://arxiv.org/abs/2509.26488, section 3.3). The span is a random block, as in `block_masks`, or the whole
    response; with a grid, it is each block of the response, each with a ratio of its own, for a model that sees them
    all at once (`block_streams.py`).

    The first view hides each token of the span with probability `mask_ratio`, the second one the others. With
    `unmasking_step` the views are states that the teacher's decoding went through (the trajectory order of d3LLM,
    https://arxiv.org/abs/2601.07568): the first hides the `mask_ratio` share of the span that the teacher wrote last,
    the second hides all of it and scores what the teacher wrote first.

    Args:
        response, seed, epoch, example_id: as in `random_masks`.
        block_length (`int`, *optional*): K; None for the whole response.
        mask_ratio (`tuple[float, float]`): the range, in [0, 1], that each example's ratio is drawn from.
        unmasking_step (`torch.LongTensor` of shape `(B, T)`, *optional*): the teacher's pass that wrote each token, -1
            where none did (it then counts as the last).
        grid (`int`, *optional*): as in `random_masks`; then `block_length` must be None.

    Returns:
        `Masks` of 2B rows, all first views and then all second ones.
    """
    if grid is not None and block_length is not None:
        raise ValueError(f"`block_length={block_length!r}` is not allowed with `grid={grid!r}`: it must be None.")
    span, behind = response, torch.zeros_like(response)
    if grid is None:
        draws = uniform_draws(seed, epoch, example_id, 2 + response.shape[1])
        if block_length is not None:
            span, behind = draw_block(response, block_length, draws[:, 0])
        t, draws = draws[:, 1], draws[:, 2:]
    else:
        t, draws = _draws_by_blocks(response, grid, seed, epoch, example_id)
    low, high = mask_ratio
    ratio = low + (high - low) * t
    if unmasking_step is None:
        first = span & (draws < ratio.view(len(ratio), -1))
        hidden = (first, span & ~first)
    else:
        place, length = _places_in_order(unmasking_step, span, grid)
        first = span & (place >= length - (ratio.view(len(ratio), -1) * length).round())
        hidden = (first, span)
    return Masks(
        hidden=torch.cat([view | behind for view in hidden]),
        scored=torch.cat((first, span & ~first)),
        ratio=torch.cat((ratio, 1 - ratio)),
        span_length=span.sum(dim=1).repeat(2),
    )


def _places_in_order(unmasking_step, span, grid):
    """Of each token of the span its place in the order of writing, in its block or in all of it, and how many tokens
    of the span there are, (B, T) both."""
    block = blocks_of_columns(torch.arange(span.shape[1], device=span.device), grid)
    never = torch.iinfo(unmasking_step.dtype).max
    step = torch.where(unmasking_step < 0, never - 1, unmasking_step).masked_fill(~span, never)
    order = step.argsort(dim=1, stable=True)
    order = order.gather(1, block[order].argsort(dim=1, stable=True))  # by block, and in it by step
    place = order.argsort(dim=1) - block * (grid or 0)
    block = block.expand_as(span)
    return place, torch.zeros_like(block).scatter_add(1, block, span.long()).gather(1, block)


def gather_positions(masked: torch.BoolTensor, multiple: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """The masked positions of each row, first to last: (B, T) -> positions (B, M) and is_real (B, M). M is the largest
    number in a row, rounded up to a multiple of `multiple`: 8 because matrix units like it, more for fewer shapes.
    Rows are filled up with positions that are not real."""
    counts = masked.sum(dim=1)
    longest = min(max(-(-int(counts.max()) // multiple) * multiple, 1), masked.shape[1])  # at least one, real or not
    positions = masked.int().argsort(dim=1, descending=True, stable=True)[:, :longest]
    return positions, torch.arange(longest, device=masked.device) < counts[:, None]
