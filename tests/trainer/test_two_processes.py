"""Two processes do what one does. Most of a launch is imports: one is for all families."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.families import FAMILIES
from tests.scripts import run

ROOT = Path(__file__).parents[2]


def launch(task, tmp_path, processes):
    """What each process has found, by family: a dictionary of lists."""
    # `accelerate launch --cpu --num_processes 2` starts a single process unless MPI is there; torchrun starts two.
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", processes, "-m"] if processes > 1 else []
    result = run(*launcher, "tests.trainer.two_processes", task, tmp_path, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-3000:]
    found = [json.loads((tmp_path / f"{task}-{processes}-{i}.json").read_text()) for i in range(processes)]
    return {name: [each[name] for each in found] for name in FAMILIES}


def test_training_gives_the_same_curve(tmp_path):
    ones, twos = launch("train", tmp_path, 1), launch("train", tmp_path, 2)
    for name, (curves,) in ones.items():
        assert twos[name][0] == twos[name][1]
        for one, two in zip(curves, twos[name][0], strict=True):
            assert len(one) == 6 and one[-1][0] != one[0][0]
            for a, b in zip(one, two, strict=True):
                assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


def test_evaluation_gives_the_same_metrics(tmp_path):
    ones, twos = launch("evaluate", tmp_path, 1), launch("evaluate", tmp_path, 2)
    for name, (one,) in ones.items():
        two, other = twos[name]
        assert one == pytest.approx(two, rel=1e-5) and two == other
        assert one["decoding_accuracy"] == pytest.approx(0.6)


def test_trajectories_are_the_same(tmp_path):
    twos = launch("trajectories", tmp_path, 2)
    for name, (two, other) in twos.items():
        assert two == other and [row["prompt"] for row in two] == [f"Sam has {i} books. " for i in range(7)]
        for shard in list((tmp_path / name / "trajectories").glob("*.arrow"))[1:]:
            shard.unlink()
    for name, (one,) in launch("trajectories", tmp_path, 1).items():  # goes on with a shard of two processes
        assert one == twos[name][0]


def test_a_sharded_model_gives_the_same_loss_gradients_and_tokens(tmp_path):
    """FSDP2: the positions are gathered inside `forward`, so that the head's weights are there when it is applied."""
    for result in itertools.chain(*launch("shard", tmp_path, 2).values()):
        assert result["losses"][0] == pytest.approx(result["losses"][1], abs=1e-5)
        assert result["gradients"] < 1e-5 and result["same_tokens"] and result["bfloat16"] == 0


def test_a_checkpoint_goes_on_under_another_layout(tmp_path):
    """Saved under FSDP2, resumed under DDP and by one process, and the other way round: weights, moments, rate."""
    launches = (("fsdp", 2), ("ddp", 2), ("fsdp", 2), ("ddp", 1))
    runs = [launch(task, tmp_path, processes) for task, processes in launches]
    for name, family in FAMILIES.items():
        check_layouts(family, tmp_path / name, *(each[name][0] for each in runs))


def check_layouts(family, folder, sharded, plain, resharded, one):
    assert [len(plain), len(resharded), len(one)] == [4, 2, 2]
    for kind in ("full", "adapter"):
        unbroken = plain[f"{kind}, unbroken"]
        assert len(unbroken) == 6 and unbroken[0] != unbroken[-1]
        resumed = [curves[f"{kind}, resumed"] for curves in (plain, resharded, one)]
        for curve in (sharded[f"{kind}, unbroken"], *resumed):
            assert curve == pytest.approx(unbroken, rel=1e-5)
    saved = folder / "fsdp-full" / "checkpoint-6"
    model = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
    assert type(model).__name__ == family.model.__name__ and (saved / f"modeling_{family.name}.py").exists()
    weights = load_file(folder / "ddp-full" / "checkpoint-6" / "model.safetensors")
    for name, weight in load_file(saved / "model.safetensors").items():
        torch.testing.assert_close(weight, weights[name], atol=1e-5, rtol=1e-4)


def test_a_sharded_model_with_an_adapter_decodes(tmp_path):
    for whole, sharded in itertools.chain(*launch("shard_adapter", tmp_path, 2).values()):
        assert whole == pytest.approx(sharded) and whole["nfe"] > 1
