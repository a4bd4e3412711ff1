"""Each policy against a slow and obvious version, and against the published selection functions."""

import json

import pytest
import torch
from torch import nn

from dparallel.modeling import POLICIES, Policy, TokenStatistics, token_statistics
from dparallel.modeling.unmasking import even_schedule, linear_time_schedule
from tests.golden import FIXTURES, load_cases

THRESHOLDS = {
    "confidence_threshold": (0.0, 0.3, 0.7, 1.0),
    "confidence_factor": (0.2, 0.9, 1.7, 5.0),
    "entropy_threshold": (0.0, 0.4, 1.5, 9.0),
    "entropy_bound": (0.01, 0.4, 1.5, 9.0),
    "learned_filter": (0.0, 0.3, 0.96, 1.0),
}


def slow_choice(name, confidence, entropy, margin, finality, candidates, setting):
    """The positions that a policy accepts in one row, by walking down the list of candidates."""
    if not candidates:
        return set()
    scores = {"confidence": confidence, "entropy": [-e for e in entropy], "margin": margin}
    key = "entropy" if name.startswith("entropy") else "margin" if name == "margin" else "confidence"
    order = sorted(candidates, key=lambda i: -scores[key][i])
    if name == "leftmost":
        return set(sorted(candidates)[:setting])
    if name == "confidence_threshold":
        return {i for i in candidates if confidence[i] >= setting} | {order[0]}
    if name == "learned_filter":
        return {i for i in candidates if finality[i] > setting} | {order[0]}
    if name == "entropy_threshold":
        return {i for i in candidates if entropy[i] <= setting} | {order[0]}
    if name == "entropy_bound":
        taken, total = set(), 0.0
        for i in order:
            if total > setting:
                break
            taken.add(i)
            total += entropy[i]
        return taken
    if name == "confidence_factor":
        stop = len(order) - 1
        for r, i in enumerate(order):
            if r > 0 and confidence[i] < 1 - setting / (r + 2):
                stop = r
                break
        return set(order[: stop + 1 if stop in (0, len(order) - 1) else stop])
    return set(order[:setting])


def random_statistics(generator, rows=200, length=16):
    confidence, entropy, margin, finality = torch.rand(4, rows, length, generator=generator)
    token = torch.zeros(rows, length, dtype=torch.long)
    share = torch.rand(rows, 1, generator=generator) * 1.2 - 0.1  # rows with no and with only candidates as well
    return TokenStatistics(token, confidence, entropy * 2, margin, finality), torch.rand(
        rows, length, generator=generator
    ) < share


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"random"}))
def test_policy_equals_the_slow_version(name):
    statistics, masked = random_statistics(torch.Generator().manual_seed(0))
    keyword = "count" if POLICIES[name].is_scheduled else "threshold"
    for setting in THRESHOLDS.get(name, (1, 3, 16)):
        accepted = POLICIES[name].select(statistics, masked, **{keyword: setting})
        for row in range(masked.shape[0]):
            values = [statistic[row].tolist() for statistic in statistics[1:]]
            expected = slow_choice(name, *values, masked[row].nonzero().flatten().tolist(), setting)
            assert set(accepted[row].nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_row_with_a_mask_makes_progress(name):
    statistics, masked = random_statistics(torch.Generator().manual_seed(1))
    statistics = statistics._replace(confidence=torch.full_like(statistics.confidence, torch.nan))
    keyword = {"threshold": POLICIES[name].default}
    if POLICIES[name].is_scheduled:
        keyword = {"count": 1, "uniform": torch.rand(masked.shape, generator=torch.Generator().manual_seed(2))}
    accepted = POLICIES[name].select(statistics, masked, **keyword)
    assert torch.equal(accepted.any(dim=1), masked.any(dim=1))
    assert not (accepted & ~masked).any()


def test_random_takes_the_count_and_every_position_alike():
    masked = torch.ones(4000, 8, dtype=torch.bool)
    masked[:, 3] = False
    uniform = torch.rand(masked.shape, generator=torch.Generator().manual_seed(0))
    accepted = POLICIES["random"].select(None, masked, count=2, uniform=uniform)
    assert (accepted.sum(dim=1) == 2).all() and not accepted[:, 3].any()
    share = accepted.float().mean(dim=0)[[0, 1, 2, 4, 5, 6, 7]]
    assert (share - 2 / 7).abs().max() < 0.03


def test_equal_scores_go_to_the_first_position():
    masked = torch.tensor([[False, True, True, True]])
    even = torch.full((1, 4), 0.25)
    statistics = TokenStatistics(torch.zeros(1, 4, dtype=torch.long), even, even, even)
    for name, policy in POLICIES.items():
        if policy.is_scheduled and name != "random":
            assert policy.select(statistics, masked, count=2).tolist() == [[False, True, True, False]]
    accepted = POLICIES["confidence_threshold"].select(statistics, masked, threshold=0.9)
    assert accepted.tolist() == [[False, True, False, False]]


RULES = {
    "entropy": "entropy_threshold",
    "confidence": "confidence_threshold",
    "factor": "confidence_factor",
    "topk_confidence": "confidence",
    "topk_entropy": "entropy",
}


@pytest.mark.parametrize("case", load_cases("selection_units")[0], ids=lambda case: case["id"])
def test_published_selection(case):
    """Tokens and choice of the published functions, but for scores that sit on their bar up to rounding."""
    if not case["robust_to_1e4_logit_noise"] and not case["id"].endswith("_equal_threshold"):
        pytest.skip("a score sits on its bar")
    _, tensors = load_cases("selection_units")
    logits, masked, expected = (tensors[f"{case['id']}.{name}"] for name in ("logits", "mask_index", "transfer_index"))
    # These logits are of a vocabulary without [MASK]: add one that is impossible.
    statistics = token_statistics(nn.functional.pad(logits, (0, 1), value=-torch.inf), logits.shape[-1])
    policy = POLICIES[RULES[case["rule"]]]
    if policy.is_scheduled:
        rows = [
            policy.select(
                TokenStatistics(*(each[i : i + 1] for each in statistics[:4])), masked[i : i + 1].bool(), count=count
            )
            for i, count in enumerate(case["num_transfer"])
        ]
        accepted = torch.cat(rows)
    else:
        setting = case["factor"] if case["rule"] == "factor" else case["threshold"]
        accepted = policy.select(statistics, masked.bool(), threshold=setting)
    assert torch.equal(accepted, expected.bool())
    assert torch.equal(statistics.token[masked.bool()], tensors[f"{case['id']}.x0"][masked.bool()])


def test_even_schedule_is_the_published_one():
    for case in json.loads((FIXTURES / "cases" / "fixed_schedule_counts.json").read_text()):
        published = [count for count in case["counts"] if count]
        assert even_schedule(case["masks"], case["steps"]) == published


@pytest.mark.parametrize(("masks", "steps"), [(64, 64), (64, 32), (64, 20), (32, 7), (5, 9), (1, 1)])
def test_linear_time_schedule(masks, steps):
    counts, left = [], masks
    t = [1 + i * (1e-3 - 1) / steps for i in range(steps + 1)]
    for i in range(steps):
        counts.append(left if i == steps - 1 else int(left * (1 - t[i + 1] / t[i]) + 1e-6))
        left -= counts[-1]
    assert linear_time_schedule(masks, steps) == [count for count in counts if count]
    assert sum(linear_time_schedule(masks, steps)) == masks


def idle(statistics, masked, *, threshold):
    return torch.zeros_like(masked)


def shares(statistics, masked, *, threshold):
    return statistics.confidence


def test_a_policy_that_writes_nothing_is_an_error(model, prompt, monkeypatch):
    monkeypatch.setitem(POLICIES, "idle", Policy(idle, default=0.5))
    for cache in ("none", "dual"):
        with pytest.raises(ValueError, match="`unmasking='idle'` wrote nothing in some passes"):
            model.generate(prompt, max_new_tokens=12, block_length=4, unmasking="idle", block_cache=cache)
    monkeypatch.setitem(POLICIES, "shares", Policy(shares, default=0.5))
    with pytest.raises(ValueError, match=r"policy 'shares' returned torch.float32 of shape .* it must be bool"):
        model.generate(prompt, max_new_tokens=12, block_length=4, unmasking="shares")
    monkeypatch.setitem(POLICIES, "idle", idle)
    with pytest.raises(ValueError, match=r"`POLICIES\['idle'\]` is a function: it must be a `Policy`"):
        model.generate(prompt, unmasking="idle")
