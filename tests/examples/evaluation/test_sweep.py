"""Sweeps and calibration, from the shell on the example model, and their arithmetic on points that are made up."""

import json
import random
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from dparallel.evaluation import calibrate as calibration
from dparallel.evaluation import evaluation
from dparallel.evaluation import plot as plotting
from dparallel.evaluation import sweep as sweeping
from dparallel.evaluation.command_line import find_task
from dparallel.evaluation.sweep import to_table
from dparallel.hub_cards.measurements import (
    Difference,
    Measurement,
    fastest,
    load_measurements,
    paired_difference,
)
from dparallel.modeling import POLICIES
from dparallel.trainer.trajectories import decode_prompts
from tests.golden import CHECKPOINT, STUDENT
from tests.scripts import call

TASK = f"{CHECKPOINT.parent / 'evaluate_word_problems.py'}:WORD_PROBLEMS"
POINT = Measurement(
    task="T", dataset="d", split="test", num_examples=10, accuracy=0.9, nfe=20.0, tpf=3.0, seconds=2.0,
    decoding={"unmasking": "entropy_threshold", "threshold": 0.1}, hardware="CPU", date="2026-11-25", versions="torch",
)  # fmt: skip


@pytest.mark.journey
def test_a_sweep(tmp_path, monkeypatch):
    flags = [
        "--task",
        TASK,
        "--model",
        STUDENT,
        "--limit",
        2,
        "--output-dir",
        tmp_path,
        "--block-cache",
        "none",
        "dual",
    ]
    flags += ["--unmasking", "entropy_threshold=0.1,30", "confidence=32", "--max-new-tokens", 64]
    result = call("dparallel.evaluation.sweep", *flags)
    assert result.returncode == 0, result.stderr
    points = load_measurements(tmp_path / "results.json")
    assert [[v for k, v in point.decoding.items() if k != "max_new_tokens"] for point in points] == [
        [policy, value, cache]
        for policy, values in (("entropy_threshold", [0.1, 30.0]), ("confidence", [32]))
        for cache in ("none", "dual")
        for value in values
    ]  # fmt: skip
    assert all(point.seconds > 0 for point in points) and points[0].nfe > points[1].nfe
    assert all(point.tokens_per_second > 0 for point in points)
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    report = (tmp_path / "sweep.md").read_text()
    assert report.strip() in result.stdout and "- AUP of entropy threshold, dual cache: " in report
    monkeypatch.setattr("dparallel.trainer.trajectories.decode_prompts", None)
    assert call("dparallel.evaluation.sweep", *flags).stdout == result.stdout, "nothing is decoded again"


@pytest.mark.journey
def test_a_sweep_is_warm_before_the_clock_runs(word_model, word_tokenizer, tmp_path, monkeypatch):
    """Once for each policy and cache, or where a killed sweep goes on; and the answers are those of a cold one."""
    events = []

    def decode(model, tokenizer, prompts, **settings):
        events.append((len(prompts), settings["unmasking"], settings["block_cache"]))
        return decode_prompts(model, tokenizer, prompts, **settings)

    def sweep(grid):
        events.clear()
        folder = tmp_path / "warm"
        sweeping.sweep(task, word_model, word_tokenizer, folder, grid, caches=caches, **arguments)
        return events

    task, caches = find_task(TASK), ["none", "dual"]
    arguments = {"limit": 3, "batch_size": 2, "max_new_tokens": 32}
    monkeypatch.setattr(evaluation, "decode_prompts", decode)  # what is timed calls it by another module's name
    monkeypatch.setattr(evaluation, "time", SimpleNamespace(perf_counter=lambda: events.append("clock") or 1.0))
    once = [(2, "entropy_threshold", "none"), "clock", "clock"], [(2, "entropy_threshold", "dual"), "clock", "clock"]
    assert sweep({"entropy_threshold": [30.0]}) == [*once[0], *once[1]]
    later = [event for each in once for event in ["clock", *each]]
    assert sweep({"entropy_threshold": [30.0, 40.0]}) == later, "the first that has no answers yet"
    decoding = {"max_new_tokens": 32, "unmasking": "entropy_threshold", "threshold": 40.0, "block_cache": "dual"}
    cold = tmp_path / "cold"
    evaluation.evaluate_task(task, word_model, word_tokenizer, cold, limit=3, batch_size=2, **decoding)
    assert events[-2:] == ["clock", "clock"] and len(events) == len(later) + 2
    for name in (evaluation.SAMPLES_FILE, evaluation.RESULTS_FILE):
        assert (cold / name).read_bytes() == (tmp_path / "warm" / "entropy_threshold-40.0-dual" / name).read_bytes()


def test_tokens_per_second(tmp_path):
    """In the table and in JSON, where the seconds are known; files without them are still read."""
    point, untimed = replace(POINT, num_examples=1000), replace(POINT, seconds=None)
    assert point.tokens_per_second == 3 * 20 * 1000 / 2 and untimed.tokens_per_second is None
    lines = to_table([point, untimed]).splitlines()
    assert " | 20.0 | 3.00 | 2.0 | 30,000 | " in lines[2] and " | 20.0 | 3.00 |  |  | " in lines[3]
    path = tmp_path / "results.json"
    evaluation.write_measurements([point, untimed], path)
    entries = json.loads(path.read_text())["measurements"]
    assert [entry.get("tokens_per_second") for entry in entries] == [30000, None]
    assert load_measurements(path) == [point, untimed]
    path.write_text(json.dumps({"measurements": [{k: v for k, v in entries[0].items() if k != "tokens_per_second"}]}))
    assert load_measurements(path) == [point]


@pytest.mark.slow
def test_calibration_writes_the_fastest_threshold_that_is_accurate_enough(tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_new_tokens": 100}))
    flags = "--split validation --limit 2 --max-new-tokens 128 --margin 0 --bar 1 --thresholds 0.1 30".split()
    flags += ["--task", TASK, "--model", tmp_path / "model", "--output-dir", tmp_path / "out"]
    result = call("dparallel.evaluation.calibrate", *flags)
    assert result.returncode == 0, result.stderr
    config = json.loads(path.read_text())
    assert (config["unmasking"], config["threshold"]) == ("entropy_threshold", 0.1), "30 nats accept everything"
    assert config["max_new_tokens"] == 100, "the rest stays"
    assert len(load_measurements(tmp_path / "out" / "results.json")) == 2 and str(tmp_path / "out") in result.stdout
    assert "threshold 0.1, max_new_tokens 128: +0.0 (-65.8 to +0.0) points against the bar of 100%" in result.stdout
    assert "Warning: `margin=0.0`, 0 points, is inside the noise: on these 2 problems" in result.stderr
    result = call("dparallel.evaluation.calibrate", *flags, "--thresholds", 30)
    assert result.returncode == 1 and "no threshold is that accurate; nothing was written" in result.stderr


@pytest.mark.slow
def test_the_bar_is_that_of_slow_decoding(word_model, word_tokenizer, tmp_path):
    task = find_task(TASK)
    arguments = {"limit": 2}
    chosen, points = calibration.calibrate(
        task, word_model, word_tokenizer, tmp_path, "confidence_threshold", [0.9], **arguments
    )
    assert points[0].decoding == {"unmasking": "confidence", "steps": 128, "block_cache": "none"}
    assert points[0].nfe > 2 * points[1].nfe and points[0].accuracy == 1 and chosen == points[1]
    difference = calibration.difference_to_slow(tmp_path, chosen, points)
    assert difference == paired_difference([True, True], [True, True])
    assert "About" in calibration.warning_of_noise(difference, 0.01, 2)
    for wrong in ({"margin": 1.5}, {"bar": -1}):
        with pytest.raises(ValueError, match=rf"`{next(iter(wrong))}=.* is not allowed: it must be from 0 to 1"):
            calibration.calibrate(task, word_model, word_tokenizer, tmp_path, "entropy_threshold", [0.1], **wrong)
    with pytest.raises(ValueError, match="`threshold=9` is not allowed"):
        calibration.calibrate(task, word_model, word_tokenizer, tmp_path / "new", "confidence_threshold", [0.9, 9])
    assert not (tmp_path / "new").exists(), "before slow decoding"


def test_noise_is_said():
    few, many = [True, False] * 8, [True, False] * 5000
    difference = paired_difference(few, few)
    assert difference.mean == 0 and difference.low < -0.1 and difference.high == -difference.low
    assert "16 problems up to 15.4 points may be lost. About" in calibration.warning_of_noise(difference, 0.01, 16)
    assert calibration.warning_of_noise(paired_difference(many, many), 0.01, 10000) is None
    worse = calibration.warning_of_noise(Difference(-0.02, -0.03, -0.01), 0.02, 900)
    assert "up to 3.0 points may be lost" in worse and "further inside the margin" in worse
    assert str(Difference(0.003, -0.005, 0.012)) == "+0.3 (-0.5 to +1.2)"


def test_the_paired_interval_covers():
    """Drawn from known chances, 95% of the intervals hold the true difference."""
    generator, covered = random.Random(0), 0
    for _ in range(400):
        draws = [generator.random() for _ in range(60)]  # 10% gained, 25% lost
        first, second = [0.25 <= each for each in draws], [not 0.25 <= each < 0.35 for each in draws]
        difference = paired_difference(first, second)
        covered += difference.low <= 0.1 - 0.25 <= difference.high
    assert 0.93 <= covered / 400 <= 0.99


def test_points_become_curves_and_areas():
    cached = {**POINT.decoding, "block_cache": "dual"}
    points = [
        POINT, replace(POINT, nfe=10.0, tpf=6.0, accuracy=0.88), replace(POINT, decoding=cached, accuracy=0.8),
    ]  # fmt: skip
    curves = plotting.curves_of(points)
    assert {curve.label: [point.nfe for point in curve.points] for curve in curves} == {
        "entropy threshold": [10.0, 20.0], "entropy threshold, dual cache": [20.0],
    }  # fmt: skip
    assert curves[0].colour == curves[1].colour and curves[0].line != curves[1].line
    areas = plotting.aup(curves)
    weighted = 88 * 2.718281828459045 ** (-3 * (1 - 88 / 90))
    assert areas["entropy threshold"] == pytest.approx(3 * 90 + (6 - 3) * (90 + weighted) / 2)
    assert areas["entropy threshold, dual cache"] == pytest.approx(3 * 80)
    assert fastest(points, 0.85).nfe == 10 and fastest(points, 0.95) is None


def test_each_policy_has_a_colour_of_its_own():
    assert set(plotting.POLICY_COLOURS) == set(POLICIES) and len(set(plotting.POLICY_COLOURS.values())) == len(
        POLICIES
    )
    own = replace(POINT, decoding={"unmasking": "mine", "threshold": 1.0}, model="teacher")
    shipped = replace(POINT, decoding={}, resolved_decoding={"unmasking": "entropy_bound", "block_cache": "prefix"})
    curves = plotting.curves_of([own, shipped, replace(POINT, decoding={})])
    assert [(curve.label, curve.colour) for curve in curves] == [
        ("teacher, mine", "black"), ("entropy bound, prefix cache", "tab:green"), ("as shipped", "black"),
    ]  # fmt: skip


def crowd(count, seed=0):
    """Curves that lie upon each other."""
    draw = random.Random(seed)
    grid = [(policy, cache) for policy in POLICIES for cache in ("none", "dual")][:count]
    return [
        replace(
            POINT, decoding={"unmasking": policy, "threshold": number, "block_cache": cache}, num_examples=500,
            nfe=10 + 10 * (1 - number) + draw.random(), accuracy=0.93 - number / 10 + draw.random() / 100,
        )
        for policy, cache in grid for number in (0.1, 0.3, 0.5)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "points",
    [
        [POINT],
        [replace(POINT, accuracy=0.0), replace(POINT, accuracy=1.0, nfe=300.0, seconds=None)],
        [replace(POINT, accuracy=0.99), *(replace(POINT, decoding={"unmasking": "margin"}, accuracy=0.01),) * 2],
        crowd(3),
        crowd(6),
    ],
    ids=["one point", "far apart", "one curve far below", "crowd", "larger crowd"],
)
def test_labels_of_a_picture(points, tmp_path, monkeypatch):
    """The name of each curve and the number of each point in sight, none upon another; ticks; intervals."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    curves = plotting.with_aup(plotting.curves_of(points))
    plotting.plot(curves, tmp_path / "picture.png", "title", bar=0.9)
    figures[0].draw_without_rendering()
    panels = figures[0].axes
    assert len(panels) == (1 if any(point.seconds is None for point in points) else 2) and not figures[0].legends
    for axes in panels:
        texts = list(axes.texts)
        names = [curve.label for curve in curves]
        assert [text.get_text() for text in texts[: len(names)]] == names and axes.get_legend() is None
        low, high = axes.get_ylim()
        seen = [point for point in points if low <= 100 * point.accuracy <= high]
        numbers = sorted(f"{point.decoding['threshold']:g}" for point in seen if "threshold" in point.decoding)
        assert sorted(text.get_text() for text in texts[len(names) :]) == numbers
        assert all(any(point in seen for point in curve.points) for curve in curves), "something of each curve"
        boxes = [Text.get_window_extent(text) for text in texts]
        for i, box in enumerate(boxes):
            assert all(axes.bbox.padded(1).contains(*corner) for corner in (box.min, box.max))
            assert not any(box.padded(-0.5).overlaps(other.padded(-0.5)) for other in boxes[:i])
        ticks = {
            label.get_fontsize() for axis in (axes.xaxis, axes.yaxis) for label in axis.get_ticklabels(which="both")
        }
        assert len(ticks) == 1
        heights = [path[:, 1] for lines in axes.collections for path in lines.get_segments()]
        ends = [[100 * end for end in point.interval] for curve in curves for point in curve.points]
        assert np.allclose(ends, heights)


def test_a_picture_is_drawn_again(tmp_path):
    for name in ("sweep.json", "results.json"):
        shutil.copy(STUDENT / name, tmp_path)
        result = call("dparallel.evaluation.plot", tmp_path / name)
        assert result.returncode == 0, result.stderr
        assert (tmp_path / name).with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "empty.json").write_text('{"measurements": []}')
    for name, message in (("empty.json", "it holds no measurement"), ("none.json", "there is no such file")):
        result = call("dparallel.evaluation.plot", tmp_path / name)
        assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr


def test_settings_of_all_points(word_model):
    """A cache's are not where there is none; what is wrong at one point is found before the first is decoded."""
    common = {"cache_refresh_interval": 2, "block_length": 16, "max_new_tokens": 32}
    grid, point = {"entropy_threshold": [0.5]}, {"unmasking": "entropy_threshold", "threshold": 0.5}
    assert sweeping.decodings_of(word_model, grid, caches=["none", "dual"], limit=2, **common) == {
        "entropy_threshold-0.5-none": point | {"block_cache": "none", "block_length": 16, "max_new_tokens": 32},
        "entropy_threshold-0.5-dual": point | {"block_cache": "dual"} | common,
    }
    assert "block_cache" not in sweeping.decodings_of(word_model, grid)["entropy_threshold-0.5"]
    with pytest.raises(ValueError, match=r"`threshold=2\.0` is not allowed"):
        sweeping.decodings_of(word_model, {"confidence_threshold": [0.9, 2.0]})
    with pytest.raises(ValueError, match="`unmasking_filter=None` is not allowed"):
        sweeping.decodings_of(word_model, {"entropy_threshold": [0.5], "learned_filter": [0.5]})


@pytest.mark.parametrize(
    ("word", "allowed"),
    [
        ("nothing=1", "it must be POLICY=NUMBER,NUMBER,... with a policy of ['confidence'"),
        ("=1", "it must be POLICY=NUMBER,NUMBER,... with a policy of ['confidence'"),
        ("entropy_threshold=a", "behind `entropy_threshold=`, it must have thresholds"),
        ("entropy_threshold", "behind `entropy_threshold=`, it must have thresholds"),
        ("entropy=0.1", "behind `entropy=`, it must have whole numbers of steps"),
        ("confidence=", "behind `confidence=`, it must have whole numbers of steps"),
    ],
)
def test_wrong_grids(word, allowed):
    with pytest.raises(ValueError, match=re.escape(f"`unmasking={word!r}` is not allowed: {allowed}")):
        sweeping.parse_grid([word])


def test_wrong_tasks(tmp_path):
    (tmp_path / "mine.py").write_text("TASK = 1\n")
    for name, message in (
        ("gsm9k", r"`task='gsm9k'` is not allowed: it must be one of \['gsm8k', 'humaneval'"),
        (f"{tmp_path}/mine.py:TASK", "has no Task of the name 'TASK'"),
        (f"{tmp_path}/other.py:TASK", "is not allowed"),
    ):
        with pytest.raises(ValueError, match=message):
            find_task(name)
