"""What was measured of a model, as its cards show it, and where and when.

A results file is JSON with a list `measurements`; the evaluation scripts write it, and whatever else is in it is left
alone. Cards take their numbers from such files and from nowhere else.
"""

import json
import platform
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import EvalResult

RESULTS_FILE = "results.json"


@dataclass(frozen=True)
class Measurement:
    """One way of decoding, over the examples of one dataset.

    Args:
        task (`str`): what people call it, "GSM8K".
        dataset (`str`): Hub id, or name, of the data; split (`str`) and num_examples (`int`): which of it.
        decoding (`dict`): arguments of `generate()` that were given; the rest is as the checkpoint has it.
        accuracy (`float`): share of the examples that were solved, from 0 to 1.
        nfe (`float`): forward passes for one example, the mean.
        tpf (`float`): tokens up to and including the end-of-text, of all examples, over all passes.
        hardware, date, versions (`str`): where and when it was measured, and with what.
        seconds (`float`, *optional*): that all examples took together.
        num_fewshot (`int`, *optional*): solved examples before each question.
        model (`str`, *optional*): another model that was measured for comparison; the model itself if unset.
        resolved_decoding (`dict`, *optional*): what decoding went by, whoever set it: policy and its number, lengths,
            cache, ends.
        checkpoint (`str`, *optional*), revision (`str`, *optional*): Hub id, or the folder's name, of what was
            measured, and its commit on the Hub.
        adapter (`str`, *optional*), adapter_revision (`str`, *optional*): of the adapter that was not merged.
    """

    task: str
    dataset: str
    split: str
    num_examples: int
    decoding: dict
    accuracy: float
    nfe: float
    tpf: float
    hardware: str
    date: str
    versions: str
    seconds: float | None = None
    num_fewshot: int | None = None
    model: str | None = None
    resolved_decoding: dict | None = None
    checkpoint: str | None = None
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of the accuracy, see `wilson_interval`."""
        return wilson_interval(self.accuracy, self.num_examples)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens up to and including the end-of-text, of all examples, over the seconds that they took; None where
        those are not known."""
        return self.tpf * self.nfe * self.num_examples / self.seconds if self.seconds else None

    @property
    def accuracy_in_words(self) -> str:
        """The accuracy in percent, with its interval: "93.8 (93.1 to 94.4)"."""
        low, high = self.interval
        return f"{100 * self.accuracy:.1f} ({100 * low:.1f} to {100 * high:.1f})"

    @property
    def shots(self) -> str:
        """ ", 3-shot", to stand behind the task, or nothing."""
        return f", {self.num_fewshot}-shot" if self.num_fewshot else ""

    @property
    def settings(self) -> str:
        """The decoding in words, first the policy and its number, whoever set them: `entropy_threshold`, threshold
        0.1."""
        resolved = self.resolved_decoding or {}
        shown = {name: resolved[name] for name in ("unmasking", "threshold", "steps") if name in resolved}
        shown |= self.decoding
        words = [f"`{shown.pop('unmasking')}`"] if "unmasking" in shown else []
        words += [
            f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items()
        ]
        if self.decoding:
            return ", ".join(words)
        return (
            f"as saved with the model: {', '.join(words)}"
            if words
            else "as saved with the model, which was not recorded"
        )


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """95% score interval of a share (from 0 to 1) of `count` examples (Wilson 1927, https://doi.org/10.2307/2276774)."""
    z = 1.96
    centre, half = share + z**2 / (2 * count), z * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    return max((centre - half) / (1 + z**2 / count), 0.0), min((centre + half) / (1 + z**2 / count), 1.0)


class Difference(NamedTuple):
    """Of two accuracies, from -1 to 1, with its 95% interval."""

    mean: float
    low: float
    high: float

    def __str__(self):
        """In points: "+0.3 (-0.5 to +1.2)"."""
        return f"{100 * self.mean:+.1f} ({100 * self.low:+.1f} to {100 * self.high:+.1f})"


def paired_difference(verdicts: Iterable[bool], others: Iterable[bool]) -> Difference:
    """How much more accurate `verdicts` are than `others` (both lists of `bool`, of the same examples).

    The interval is that of Bonett and Price (2012, https://doi.org/10.1111/j.2044-8317.2011.02025.x, for paired
    proportions), which adds an example to either kind of disagreement: it is not empty where the two agree on a few
    examples."""
    pairs = list(zip(verdicts, others, strict=True))
    gained, lost = (sum(bool(a) is kind and bool(b) is not kind for a, b in pairs) for kind in (True, False))
    more, less, count = (gained + 1) / (len(pairs) + 2), (lost + 1) / (len(pairs) + 2), len(pairs) + 2
    half = 1.96 * ((more + less - (more - less) ** 2) / count) ** 0.5
    low, high = max(more - less - half, -1.0), min(more - less + half, 1.0)
    return Difference((gained - lost) / len(pairs), low, high)


def here_and_now(packages: Iterable[str] = ("torch", "transformers"), *, is_gpu: bool | None = None) -> dict[str, str]:
    """Where and when a measurement is made: `hardware` (of one device), `date` (2026-11-27) and `versions`.

    Args:
        packages (tuple of `str`): whose versions count; those that are not installed are left out.
        is_gpu (`bool`, *optional*): is the work done by a GPU? By default, if there is one.
    """
    is_gpu = torch.cuda.is_available() if is_gpu is None else is_gpu
    found = {package: number for package in packages if (number := _version(package))}
    return {
        "hardware": torch.cuda.get_device_name() if is_gpu else f"CPU ({platform.machine()})",
        "date": str(date.today()),
        "versions": ", ".join(f"{package} {number}" for package, number in found.items()),
    }


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:  # a package that is not there, or one that is run from its sources
        return None


def fastest(points: Iterable[Any], accuracy: float) -> Any:
    """Of the points that are at least this accurate, the one with the fewest forward passes; None if there is none.

    Args:
        points: measurements, or whatever else has an `accuracy` and an `nfe`.
        accuracy (`float`): the least that is allowed.
    """
    return min((point for point in points if point.accuracy >= accuracy), key=lambda point: point.nfe, default=None)


def load_measurements(path: str | Path) -> list[Measurement]:
    """Read a results file.

    Raises:
        ValueError: naming the file and the entry, if it holds no measurements or one that lacks something.
    """
    path = Path(path)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["measurements"]
    except FileNotFoundError as error:
        raise ValueError(f"`results={str(path)!r}` is not allowed: there is no such file.") from error
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"`results={str(path)!r}` must be a JSON file with a list `measurements`.") from error
    return from_entries(entries, path)


def from_entries(entries: list[dict], path: str | Path) -> list[Measurement]:
    """Measurements as JSON has them, `path` being the file: what they hold beyond a `Measurement`'s fields is left
    out.

    Raises:
        ValueError: naming the file and the entry, if one lacks something.
    """
    known = {field.name for field in fields(Measurement)}
    required = {field.name for field in fields(Measurement) if field.default is MISSING}
    measurements = []
    for number, entry in enumerate(entries):
        if missing := sorted(required - set(entry)):
            raise ValueError(f"{path}: measurement {number} lacks {missing}.")
        measurement = Measurement(**{name: value for name, value in entry.items() if name in known})
        if not 0 <= measurement.accuracy <= 1:
            raise ValueError(
                f"{path}: `accuracy={measurement.accuracy!r}` of measurement {number} must be from 0 to 1."
            )
        measurements.append(measurement)
    return measurements


def eval_results(measurements: Iterable[Measurement]) -> list[EvalResult]:
    """Those of the model itself, as metadata for the Hub: accuracy in percent, NFE and TPF."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=each.dataset,
            dataset_name=each.task,
            dataset_split=each.split,
            metric_type=metric,
            metric_name=f"{name}{each.shots}, {each.settings}".replace("`", ""),
            metric_value=value,
            metric_args=each.decoding | ({} if each.num_fewshot is None else {"num_few_shot": each.num_fewshot}),
        )
        for each in measurements
        if each.model is None
        for metric, name, value in (
            ("accuracy", "accuracy %", round(100 * each.accuracy, 2)),
            ("nfe", "forward passes per example", round(each.nfe, 2)),
            ("tpf", "tokens per forward pass", round(each.tpf, 2)),
        )
    ]
