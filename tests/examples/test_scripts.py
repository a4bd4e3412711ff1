"""The example scripts as a user runs them."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from evaluation import Result

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script, *arguments, cwd):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def test_quickstart(tmp_path):
    result = run("quickstart.py", "--problems", 1, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Question: " in result.stdout and " ·" in result.stdout and "59 tokens in" in result.stdout
    rows = [line for line in result.stdout.splitlines() if line.startswith("| `")]
    assert len(rows) == 7 and "| `confidence`, steps 128 | 64.0 |" in rows[0]


@pytest.mark.parametrize("count", [0, 5001])
def test_quickstart_refuses_wrong_numbers(count, tmp_path):
    result = run("quickstart.py", "--problems", count, cwd=tmp_path)
    assert result.returncode == 2 and f"--problems {count}: it must be from 1 to 5000" in result.stderr


def test_training_script_makes_a_checkpoint_that_loads(tmp_path):
    flags = "--num_train_problems 64 --num_validation_problems 2 --max_steps 2 --per_device_train_batch_size 4".split()
    flags += "--dataloader_num_workers 0 --logging_steps 1 --warmup_steps 1 --use_cpu true --output_dir out".split()
    result = run("word_problems/train.py", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "validation accuracy at one token a step: 0.000" in result.stdout
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 12e6
    names = {"modeling_llada.py", "generation_config.json", "tokenizer.json", "chat_template.jinja"}
    assert names <= {path.name for path in (tmp_path / "out").iterdir()}


def test_interval_is_wilsons():
    result = Result("name", {}, [True] * 93 + [False] * 7, 1.0, 1.0, 1.0)
    low, high = result.interval
    for p in (low, high):  # the ends are where the normal test just holds
        assert abs(0.93 - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / 100))
    assert low < result.accuracy < high
