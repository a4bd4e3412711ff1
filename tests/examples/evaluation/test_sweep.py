"""Sweeps and calibration, from the shell on the example model, and their arithmetic on points that are made up."""

import json
import random
import re
import shutil
from dataclasses import replace

import pytest

from dparallel.evaluation import calibrate as calibration
from dparallel.evaluation import sweep as sweeping
from dparallel.evaluation.command_line import find_task
from dparallel.hub_cards.measurements import (
    Difference,
    Measurement,
    fastest,
    load_measurements,
    paired_difference,
)
from tests.golden import CHECKPOINT, STUDENT
from tests.scripts import call

TASK = f"{CHECKPOINT.parent / 'evaluate_word_problems.py'}:WORD_PROBLEMS"
POINT = Measurement(
    task="T", dataset="d", split="test", num_examples=10, accuracy=0.9, nfe=20.0, tpf=3.0, seconds=2.0,
    decoding={"unmasking": "entropy_threshold", "threshold": 0.1}, hardware="CPU", date="2026-11-25", versions="torch",
)  # fmt: skip


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
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    report = (tmp_path / "sweep.md").read_text()
    assert report.strip() in result.stdout and "- AUP of entropy threshold, dual cache: " in report
    monkeypatch.setattr("dparallel.trainer.trajectories.decode_prompts", None)
    assert call("dparallel.evaluation.sweep", *flags).stdout == result.stdout, "nothing is decoded again"


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
    curves = sweeping.curves(points)
    assert {name: [point.nfe for point in line] for name, line in curves.items()} == {
        "entropy threshold": [10.0, 20.0], "entropy threshold, dual cache": [20.0],
    }  # fmt: skip
    areas = sweeping.aup(curves)
    weighted = 88 * 2.718281828459045 ** (-3 * (1 - 88 / 90))
    assert areas["entropy threshold"] == pytest.approx(3 * 90 + (6 - 3) * (90 + weighted) / 2)
    assert areas["entropy threshold, dual cache"] == pytest.approx(3 * 80)
    assert fastest(points, 0.85).nfe == 10 and fastest(points, 0.95) is None


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
