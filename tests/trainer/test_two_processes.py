"""Two processes do what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

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
        assert result["gradients"] < 1e-5 and result["same_tokens"] and result["bfloat16"] == 0


def test_a_checkpoint_goes_on_under_another_layout(family, tmp_path):
    """Saved under FSDP2, resumed under DDP and by one process, and the other way round: weights, moments, rate."""
    (sharded, _), (plain, _) = launch("fsdp", family, tmp_path, 2), launch("ddp", family, tmp_path, 2)
    (resharded, _), (one,) = launch("fsdp", family, tmp_path, 2), launch("ddp", family, tmp_path, 1)
    assert [len(plain), len(resharded), len(one)] == [4, 2, 2]
    for kind in ("full", "adapter"):
        unbroken = plain[f"{kind}, unbroken"]
        assert len(unbroken) == 6 and unbroken[0] != unbroken[-1]
        resumed = [curves[f"{kind}, resumed"] for curves in (plain, resharded, one)]
        for curve in (sharded[f"{kind}, unbroken"], *resumed):
            assert curve == pytest.approx(unbroken, rel=1e-5)
    folder = tmp_path / "fsdp-full" / "checkpoint-6"
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__name__ == family.model.__name__ and (folder / f"modeling_{family.name}.py").exists()
    weights = load_file(tmp_path / "ddp-full" / "checkpoint-6" / "model.safetensors")
    for name, weight in load_file(folder / "model.safetensors").items():
        torch.testing.assert_close(weight, weights[name], atol=1e-5, rtol=1e-4)


def test_a_sharded_model_with_an_adapter_decodes(family, tmp_path):
    for whole, sharded in launch("shard_adapter", family, tmp_path, 2):
        assert whole == pytest.approx(sharded) and whole["nfe"] > 1
