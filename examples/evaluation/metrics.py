"""The metrics as `evaluate` has them; instantiated directly, they need no network.

NumericAnswer().compute(predictions=["... so it is 1,234."], references=["#### 1234"])   # {"accuracy": 1.0}
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import datasets
import evaluate

from .answers import final_number, last_boxed
from .programs import called_names, extract_code
from .sandbox import run_tests

TEXT, WHOLE, REAL = (datasets.Value(kind) for kind in ("string", "int64", "float64"))


def _info(description, features, citation=""):
    return evaluate.MetricInfo(
        description=description,
        citation=citation,
        inputs_description=description,
        features=datasets.Features(features),
    )


def same_number(prediction: str, reference: str) -> bool:
    """Do both texts end up with the same number (see `answers.final_number`)? Fractions may be rounded, to within a
    millionth."""
    number, expected = final_number(prediction), final_number(reference)
    if number is None or expected is None:
        return False
    is_whole = number.denominator == expected.denominator == 1
    return number == expected or (not is_whole and abs(number - expected) <= max(Fraction(1), abs(expected)) / 10**6)


def same_formula(prediction: str, reference: str) -> bool:
    """Do both texts end up with the same expression, as `math-verify` judges it? A reference may be the expression
    alone. Call it in the main thread: its time limits are signals.

    Of several boxes in a prediction the last one counts, as in MATH's own evaluation; or all of them together, where
    `math-verify` takes those that stand near each other for a set.

    Raises:
        ValueError: for a reference without an expression.
    """
    from math_verify import parse, verify

    box = last_boxed(reference)
    expected = parse(f"\\boxed{{{reference}}}" if box is None and "$" not in reference else reference)
    if not expected and box is not None:
        expected = parse(f"\\boxed{{{box}}}")  # of a kind that math-verify does not know, such as an fbox
    if not expected:
        raise ValueError(f"`reference={reference!r}` has no expression.")
    answer = last_boxed(prediction)
    is_last_right = answer is not None and verify(expected, parse(f"\\boxed{{{answer}}}"))
    return is_last_right or verify(expected, parse(prediction))


class NumericAnswer(evaluate.Metric):
    """Share of predictions that end up with the number of their reference: `compute(predictions, references)`, both
    lists of texts, gives `{"accuracy": ...}`."""

    def _info(self):
        return _info(self.__doc__, {"predictions": TEXT, "references": TEXT})

    def _compute(self, predictions, references):
        return {"accuracy": _share(map(same_number, predictions, references))}


class MathAnswer(evaluate.Metric):
    """The same for expressions, compared by `math-verify`."""

    def _info(self):
        return _info(self.__doc__, {"predictions": TEXT, "references": TEXT})

    def _compute(self, predictions, references):
        return {"accuracy": _share(map(same_formula, predictions, references))}


class PassAtK(evaluate.Metric):
    """Generated programs against tests: `compute(predictions, references, k=[1])`, with a list of answers and one text
    of tests for each problem, gives `{"pass@1": ...}`, by the unbiased estimate 1 - C(n - c, k) / C(n, k) for c right
    ones of n (Chen et al. 2021, https://arxiv.org/abs/2107.03374). Runs programs only with HF_ALLOW_CODE_EVAL=1.

    Raises:
        ValueError: if a k is larger than the number of answers to a problem.
    """

    def _info(self):
        features = {"predictions": datasets.Sequence(TEXT), "references": TEXT}
        return _info(self.__doc__, features)

    def _compute(self, predictions, references, k=(1,), num_workers=4, **limits):
        fewest = min(map(len, predictions))
        for each in k:
            if not 1 <= each <= fewest:
                raise ValueError(f"`k={each!r}` is not allowed: it must be from 1 to {fewest}, the answers there are.")
        pairs = [
            (extract_code(answer, next(iter(called_names(tests)), None)), tests)
            for answers, tests in zip(predictions, references, strict=True)
            for answer in answers
        ]
        with ThreadPoolExecutor(num_workers) as pool:  # each program is a process of its own
            verdicts = iter(list(pool.map(lambda pair: run_tests(*pair, **limits).passed, pairs)))
        right = [(len(answers), sum(next(verdicts) for _ in answers)) for answers in predictions]
        return {f"pass@{each}": sum(pass_at_k(n, c, each) for n, c in right) / len(right) for each in k}


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that one of k answers is right, when c of n were."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


class DecodingEfficiency(evaluate.Metric):
    """Passes and tokens: `compute(num_forward_passes, num_tokens)`, lists with a number for each example (tokens up to
    and including the end-of-text), gives `{"nfe": mean passes for an example, "tpf": all tokens over all passes}`."""

    def _info(self):
        return _info(self.__doc__, {"num_forward_passes": WHOLE, "num_tokens": WHOLE})

    def _compute(self, num_forward_passes, num_tokens):
        passes = sum(num_forward_passes)
        return {"nfe": passes / len(num_forward_passes), "tpf": sum(num_tokens) / passes}


class AccuracyUnderParallelism(evaluate.Metric):
    """AUP of one way of decoding over its thresholds: `compute(tpf, accuracy, best_accuracy=None)`, lists with a
    number for each threshold, accuracy in percent, gives `{"aup": ...}` (see `accuracy_under_parallelism`)."""

    def _info(self):
        return _info(self.__doc__, {"tpf": REAL, "accuracy": REAL})

    def _compute(self, tpf, accuracy, best_accuracy=None):
        return {"aup": accuracy_under_parallelism(tpf, accuracy, best_accuracy)}


def accuracy_under_parallelism(
    tpf: Sequence[float], accuracy: Sequence[float], best_accuracy: float | None = None
) -> float:
    """d3LLM's AUP (https://arxiv.org/abs/2601.07568): the area under accuracy against tokens per forward pass, where
    accuracy y counts by the weight min(exp(-3 (1 - y / best)), 1), and points more than 5 below the slowest are left
    out.

    Args:
        tpf (list of `float`), accuracy (list of `float`, in percent): of each point, in any order.
        best_accuracy (`float`, *optional*): the best of any method on this task; by default that of these points.
    """
    points = sorted(zip(tpf, accuracy, strict=True))
    if not points or not all(0 <= y <= 100 for _, y in points):
        raise ValueError(f"`accuracy={list(accuracy)!r}` is not allowed: it must hold percents, one at least.")
    best = best_accuracy if best_accuracy is not None else max(y for _, y in points)
    points = [(x, y) for x, y in points if y >= points[0][1] - 5]

    def weighted(y):
        return y * min(math.exp(-3 * (1 - y / best)), 1) if best else 0.0

    area = points[0][0] * points[0][1]
    for (x, y), (x_before, y_before) in zip(points[1:], points, strict=False):
        area += (x - x_before) * (weighted(y) + weighted(y_before)) / 2
    return area


def _share(verdicts):
    verdicts = list(verdicts)
    return sum(verdicts) / len(verdicts)
