"""Two processes do what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "two_processes.py"


def launch(task, family, tmp_path, processes):
    # `accelerate launch --cpu --num_processes 2` starts a single process unless MPI is there; torchrun starts two.
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    folders = [str(SCRIPT.parents[i] / folder) for i, folder in ((1, "."), (0, "."), (1, "modeling"))]
    run = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), SCRIPT, task, family.name, tmp_path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads((tmp_path / f"{task}-{processes}-{i}.json").read_text()) for i in range(processes)]


def test_training_gives_the_same_curve(family, tmp_path):
    (one,), (two, other) = launch("train", family, tmp_path, 1), launch("train", family, tmp_path, 2)
    assert len(one) == 6 and one[-1][0] != one[0][0] and two == other
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


def test_evaluation_gives_the_same_metrics(family, tmp_path):
    (one,), (two, other) = launch("evaluate", family, tmp_path, 1), launch("evaluate", family, tmp_path, 2)
    assert one == pytest.approx(two, rel=1e-5) and two == other
    assert one["decoding_accuracy"] == pytest.approx(0.6)


def test_trajectories_are_the_same(family, tmp_path):
    two, other = launch("trajectories", family, tmp_path, 2)
    assert two == other and [row["prompt"] for row in two] == [f"Sam has {i} books. " for i in range(7)]
    for shard in list((tmp_path / "trajectories").glob("*.arrow"))[1:]:
        shard.unlink()
    (one,) = launch("trajectories", family, tmp_path, 1)  # goes on with a shard of two processes
    assert one == two


def test_a_sharded_model_gives_the_same_loss_gradients_and_tokens(family, tmp_path):
    """FSDP2: the positions are gathered inside `forward`, so that the head's weights are there when it is applied."""
    for result in launch("shard", family, tmp_path, 2):
        assert result["losses"][0] == pytest.approx(result["losses"][1], abs=1e-5)
        assert result["gradients"] < 1e-5 and result["same_tokens"]


def test_a_sharded_model_with_an_adapter_decodes(family, tmp_path):
    for whole, sharded in launch("shard_adapter", family, tmp_path, 2):
        assert whole == pytest.approx(sharded) and whole["nfe"] > 1
