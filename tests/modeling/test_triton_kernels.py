"""The kernels against the plain functions that stand beside them: on a GPU, or, by conftest.py, in Triton's
interpreter."""

import sys

import pytest
import torch

from dparallel.modeling import modeling_llada, token_statistics, triton_kernels

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MASK = 3


@pytest.fixture(autouse=True)
def plain_functions_are_plain(monkeypatch):
    for module in (modeling_llada, sys.modules["dparallel.modeling.token_statistics"]):
        monkeypatch.setattr(module, "suit_kernels", lambda *tensors: False)


def random(*shape, seed=0, scale=1.0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE, dtype)


def assert_close(found, expected):
    """Equal up to float32 rounding, or, in narrow dtypes, to the last place."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    resolution = 1e-6 if found.dtype == torch.float32 else torch.finfo(found.dtype).eps
    torch.testing.assert_close(found, expected, atol=2 * resolution, rtol=2 * resolution)


def check_statistics(logits):
    expected = token_statistics(logits, MASK)
    found = triton_kernels.fused_token_statistics(logits, MASK)
    assert torch.equal(found[0], expected.token)
    for values, wanted in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(values, wanted, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [4, 5, 100, 1024, 1025, 9001])
def test_statistics(vocab_size, dtype):
    check_statistics(random(2, 3, vocab_size, scale=4, dtype=dtype))
    check_statistics(random(2, 7, vocab_size, scale=0.1, dtype=dtype)[:, 2:5])  # rows at a distance
    check_statistics(random(3, vocab_size, 4, dtype=dtype).transpose(1, 2))


@pytest.mark.parametrize("vocab_size", [6, 5000])
def test_statistics_of_odd_logits(vocab_size):
    """All equal, huge, hugely negative, alone among -inf, tied, and [MASK] the likeliest."""
    logits = torch.zeros(1, 8, vocab_size, device=DEVICE)
    logits[0, 1, 2] = 1e4
    logits[0, 2] = -torch.inf
    logits[0, 2, 4] = 0.0
    logits[0, 3] = 3e38
    logits[0, 4] = -3e38
    logits[0, 5, [MASK, 4]] = torch.tensor([9.0, 8.0], device=DEVICE)
    logits[0, 6, [2, vocab_size - 1]] = 5.0
    logits[0, 7] = -torch.inf
    logits[0, 7, [MASK, vocab_size - 1]] = 1.0
    check_statistics(logits)
    check_statistics(logits.bfloat16())


@pytest.mark.gpu
def test_statistics_at_full_size():
    for batch_size in (1, 32):
        check_statistics(random(batch_size, 32, 126464, scale=3, dtype=torch.bfloat16))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [48, 64, 4096])
def test_norm(size, dtype):
    norm = modeling_llada.LLaDARMSNorm(size, 1e-5).to(DEVICE, dtype)
    norm.weight.copy_(random(size, seed=1))
    x, residual = random(2, 5, size, dtype=dtype), random(2, 5, size, seed=2, dtype=dtype)
    assert_close(triton_kernels.fused_rms_norm(x, norm.weight, 1e-5), norm(x))
    found = triton_kernels.fused_rms_norm(x, norm.weight, 1e-5, residual)
    for part, expected in zip(found, norm(x, residual), strict=True):
        assert_close(part, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "size"), [(4, 16), (12, 128)])
def test_rotary_embedding(heads, size, dtype):
    packed = random(2, 7, 3 * heads * size, dtype=dtype)
    x = packed[..., heads * size : 2 * heads * size].unflatten(-1, (-1, size)).transpose(1, 2)
    for rows in (1, 2):
        positions = torch.randint(0, 500, (rows, 7), generator=torch.Generator().manual_seed(3)).to(DEVICE)
        tables = modeling_llada.rotary_tables(positions, size, 5e5)
        assert_close(triton_kernels.fused_rotate(x, *tables), modeling_llada.rotate(x, *tables))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [100, 4096])
def test_gated_activation(size, dtype):
    gate, up = random(2, 5, 2 * size, scale=3, dtype=dtype).split(size, dim=-1)
    assert_close(triton_kernels.fused_silu_product(gate, up), modeling_llada.silu_product(gate, up))


def test_where_kernels_are_used():
    suit = triton_kernels.suit_kernels
    x = torch.zeros(2, 3, device=DEVICE)
    assert not suit(x), "gradients are recorded"
    with torch.no_grad():
        assert suit(x) == torch.cuda.is_available()
        assert not suit(x, x.bfloat16()) and not suit(x.double()) and not suit(x.cpu())
