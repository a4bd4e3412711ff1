"""Metrics, as `evaluate` offers them, against numbers that are known."""

import itertools

import pytest

from dparallel.evaluation import (
    AccuracyUnderParallelism,
    DecodingEfficiency,
    MathAnswer,
    NumericAnswer,
    PassAtK,
    accuracy_under_parallelism,
)
from dparallel.evaluation.metrics import pass_at_k


def test_answers():
    texts, references = ["it is 1,234", "so 5", "none"], ["#### 1234", "#### 6", "#### 7"]
    assert NumericAnswer().compute(predictions=texts, references=references) == {"accuracy": 1 / 3}
    result = MathAnswer().compute(predictions=[r"\boxed{0.5}", r"\boxed{2}"], references=[r"\boxed{\frac12}"] * 2)
    assert result == {"accuracy": 0.5}


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (5, 0, 2), (4, 4, 4), (6, 5, 2)])
def test_pass_at_k_counts_all_choices(n, c, k):
    choices = list(itertools.combinations([i < c for i in range(n)], k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_programs(monkeypatch):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    right, wrong = "```python\ndef f(x):\n    return 2 * x\n```", "def f(x):\n    return x"
    tests = ["assert f(2) == 4", "assert f(3) == 6"]
    result = PassAtK().compute(predictions=[[right, wrong], [wrong, wrong]], references=tests, k=[1, 2])
    assert result == {"pass@1": 0.25, "pass@2": 0.5}
    with pytest.raises(ValueError, match=r"`k=3` is not allowed: it must be from 1 to 2"):
        PassAtK().compute(predictions=[[right, wrong]], references=tests[:1], k=[3])


def test_efficiency_is_over_all_passes():
    result = DecodingEfficiency().compute(num_forward_passes=[10, 30], num_tokens=[100, 20])
    assert result == {"nfe": 20.0, "tpf": 3.0}


def test_accuracy_under_parallelism():
    """Twice by hand: the weight of 76 where 80 is the best is exp(-3 * 4 / 80)."""
    weighted = 76 * 2.718281828459045 ** (-3 * 4 / 80)
    expected = 1 * 80 + (3 - 1) * (80 + weighted) / 2
    assert accuracy_under_parallelism([3, 1], [76, 80]) == pytest.approx(expected)
    assert accuracy_under_parallelism([3, 1, 9], [76, 80, 74]) == pytest.approx(expected), "74 is 6 below the slowest"
    assert accuracy_under_parallelism([1, 3], [80, 80], best_accuracy=80) == 240
    assert accuracy_under_parallelism([1, 3], [40, 40], best_accuracy=80) < 80 + 40
    assert accuracy_under_parallelism([1], [0]) == 0
    assert AccuracyUnderParallelism().compute(tpf=[1, 3], accuracy=[80, 76])["aup"] == pytest.approx(expected)
    for wrong in ([], [101]):
        with pytest.raises(ValueError, match=r"`accuracy=.* is not allowed"):
            accuracy_under_parallelism([1] * len(wrong), wrong)
