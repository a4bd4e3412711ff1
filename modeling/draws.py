# SPDX-License-Identifier: Apache-2.0; dparallel 0.2.0
"""Random numbers that depend on what they are for, and on nothing else.

A number is a function of a seed, the request, the request's pass and the position, so an answer that is drawn does not
depend on the other rows of its batch either, and a captured step draws anew in each replay. The mixing of bits is
SplitMix64's (Steele et al., "Fast splittable pseudorandom number generators", OOPSLA 2014).
"""

import torch

TOKENS, POSITIONS = range(2)  # what numbers of the same pass and position are for
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64  # 64-bit integers are signed here, and wrap around
_FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def draw_seed(generator: torch.Generator | None) -> int:
    """One seed for a whole call, from a generator or from PyTorch's global one."""
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (1,), generator=generator, device=device))


def mixed(seed: int, *numbers: int) -> int:
    """A seed, from 0 to 2**63 - 1, that belongs to these numbers."""
    state = torch.tensor(seed)
    for number in torch.tensor(numbers):
        state = _mix(state + _INCREMENT * (number + 1))
    return int(state & (2**63 - 1))


def uniform(
    seed: torch.Tensor, request: torch.Tensor, number: torch.Tensor, position: torch.Tensor, purpose: int
) -> torch.Tensor:
    """Float32 numbers between 0 and 1, both excluded, uniform and independent.

    Args:
        seed (`torch.LongTensor` of shape `()`): of the call.
        request, number (`torch.LongTensor` of shape `(B,)`): which request a row answers, and which of its passes this
            is.
        position (`torch.LongTensor` of shape `(B, K)`): in the row.
        purpose (`int`): `TOKENS` or `POSITIONS`.

    Returns:
        `torch.FloatTensor` of shape `(B, K)`.
    """
    row = _mix(_mix(seed + _INCREMENT * (request + 1)) + _INCREMENT * (2 * number + purpose + 1))
    bits = _mix(row[:, None] + _INCREMENT * (position + 1)) >> 42 & 2**22 - 1
    # Of so few bits that no product with a sum near 1 is rounded up to that sum.
    return (bits.float() + 0.5) * 2.0**-22


def _mix(state):
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        state = (state ^ _shifted(state, shift)) * factor
    return state ^ _shifted(state, 31)


def _shifted(state, bits):
    """To the right, with zeros from the left."""
    return state >> bits & 2 ** (64 - bits) - 1
