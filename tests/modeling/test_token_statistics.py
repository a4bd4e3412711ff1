"""float32 statistics against float64, and the choice of a token."""

import pytest
import torch

from dparallel.modeling import POLICIES, TokenStatistics, token_statistics
from dparallel.modeling.generation_config_diffusion import SAMPLING_FIELDS

MASK = 3


def reference(logits):
    """Token, confidence, entropy and margin in float64, as the published code computes them."""
    probs = logits.double().softmax(dim=-1)
    entropy = -(probs * torch.log(probs + 1e-12)).sum(dim=-1)
    probs[..., MASK] = 0
    ordered = probs.sort(dim=-1, descending=True).values
    return TokenStatistics(probs.argmax(dim=-1), ordered[..., 0], entropy, ordered[..., 0] - ordered[..., 1])


def test_decisions_equal_those_in_float64():
    """On 10,000 rows of 8 positions, over logits from flat to peaked, every policy accepts the same positions.

    Near-ties: a row is left out for a policy if some two scores of it, or a score and the bar, lie closer than 1e-5 in
    float64, since either decision is then right. That must concern few rows, and is counted.
    """
    generator = torch.Generator().manual_seed(0)
    scale = 10 ** (torch.rand(10_000, 1, 1, generator=generator) * 2 - 1)
    logits = torch.randn(10_000, 8, 50, generator=generator) * scale
    fast, exact = token_statistics(logits, MASK), reference(logits)
    top = logits.double().sort(dim=-1, descending=True).values
    clear = top[..., 0] - top[..., 1] > 1e-5
    assert torch.equal(fast.token[clear], exact.token[clear])
    masked = torch.rand(10_000, 8, generator=generator) < 0.8
    settings = {"confidence_threshold": 0.6, "confidence_factor": 1.2, "entropy_threshold": 0.5, "entropy_bound": 0.5}
    for name in sorted(set(POLICIES) - {"random", "learned_filter"}):
        policy = POLICIES[name]
        key = "margin" if name == "margin" else "entropy" if name.startswith("entropy") else "confidence"
        score = getattr(exact, key).masked_fill(~masked, torch.inf).sort(dim=1).values
        gap = score.diff(dim=1).nan_to_num(nan=1.0).amin(dim=1)
        bars = [settings[name]] if name.endswith("threshold") else []
        if name == "confidence_factor":
            bars = [1 - settings[name] / (rank + 2) for rank in range(8)]
        if name == "entropy_bound":
            score = score.nan_to_num(posinf=0.0).cumsum(dim=1)
            bars = [settings[name]]
        for bar in bars:
            gap = torch.minimum(gap, (score - bar).abs().amin(dim=1))
        setting = {"count": 2} if policy.is_scheduled else {"threshold": settings[name]}
        same = (policy.select(fast, masked, **setting) == policy.select(exact, masked, **setting)).all(dim=1)
        assert same[gap > 1e-5].all(), name
        assert (gap > 1e-5).float().mean() > 0.7, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values(dtype):
    logits = (torch.randn(4, 8, 100, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)
    fast, exact = token_statistics(logits, MASK), reference(logits)
    for name in ("confidence", "entropy", "margin"):
        assert getattr(fast, name).dtype == torch.float32
        torch.testing.assert_close(getattr(fast, name).double(), getattr(exact, name), atol=1e-5, rtol=1e-5)


def test_mask_is_never_chosen_but_counts():
    logits = torch.zeros(1, 1, 8)
    logits[..., MASK] = 10.0
    logits[..., 5] = 5.0
    statistics = token_statistics(logits, MASK)
    assert statistics.token.item() == 5
    probs = logits.softmax(dim=-1)[0, 0]
    assert statistics.confidence.item() == pytest.approx(probs[5].item())
    assert statistics.entropy.item() == pytest.approx(-(probs * probs.log()).sum().item(), abs=1e-6)
    assert statistics.margin.item() == pytest.approx((probs[5] - probs[0]).item())


def test_odd_logits():
    logits = torch.zeros(1, 4, 6)
    logits[0, 1] = 1e4 * torch.eye(6)[2]
    logits[0, 2] = -torch.inf
    logits[0, 2, 4] = 0.0
    logits[0, 3] += 3e38
    statistics = token_statistics(logits, MASK)
    assert statistics.token.tolist() == [[0, 2, 4, 0]]
    torch.testing.assert_close(statistics.entropy[0], torch.tensor([6.0, 1.0, 1.0, 6.0]).log())
    torch.testing.assert_close(statistics.confidence[0], torch.tensor([1 / 6, 1.0, 1.0, 1 / 6]))
    assert all(statistic.isfinite().all() for statistic in statistics[:4])


def test_sampling_follows_the_warped_distribution():
    from transformers.generation import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper

    row = torch.tensor([2.0, 1.0, 0.0, 5.0, -1.0])
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.7), TopKLogitsWarper(3)])
    logits = row.expand(1, 40_000, 5).clone()
    uniform = torch.rand(logits.shape[:-1], generator=torch.Generator().manual_seed(0))
    statistics = token_statistics(logits, MASK, warpers, uniform)
    shares = torch.bincount(statistics.token[0], minlength=5) / 40_000
    expected = torch.cat(((row[:3] / 0.7).softmax(dim=0), torch.zeros(2)))
    assert (shares - expected).abs().max() < 0.01
    # Certainty is that of the untempered distribution.
    torch.testing.assert_close(statistics.confidence[0], row.softmax(dim=0)[statistics.token[0]])
    assert "temperature" in SAMPLING_FIELDS
