"""Two processes do what one does. Most of a launch is imports: one is for all families, and for as many tasks as can
share it; what one process does is done here."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.families import ALL_FAMILIES
from tests.scripts import run
from tests.trainer import two_processes

ROOT = Path(__file__).parents[2]


def launch(folder, *tasks):
    """What each of two processes has found, by task and family."""
    # `accelerate launch --cpu --num_processes 2` starts a single process unless MPI is there; torchrun starts two.
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    result = run(*launcher, "-m", "tests.trainer.two_processes", folder, *tasks, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-3000:]
    found = [json.loads((folder / f"process-{i}.json").read_text()) for i in range(2)]
    return {task: {name: [each[task][name] for each in found] for name in ALL_FAMILIES} for task in tasks}


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path, word_tokenizer, subtests):
    # FSDP2 comes last: it makes accelerate take the processes for GPUs.
    twos = launch(tmp_path, "train", "evaluate", "trajectories", "shard", "shard_adapter", "ddp", "fsdp")

    def one(task):
        """The same by one process: this one."""
        return two_processes.run_task(task, tmp_path, word_tokenizer)

    for check in (
        training_gives_the_same_curve, evaluation_gives_the_same_metrics, trajectories_are_the_same,
        a_sharded_model_gives_the_same_loss_gradients_and_tokens, a_sharded_model_with_an_adapter_decodes,
        a_checkpoint_goes_on_under_another_layout,
    ):  # fmt: skip
        with subtests.test(check.__name__):
            check(twos, one, tmp_path)


def training_gives_the_same_curve(twos, one, folder):
    for name, curves in one("train").items():
        found, other = twos["train"][name]
        assert found == other
        for one_curve, two_curve in zip(curves, found, strict=True):
            assert len(one_curve) == 6 and one_curve[-1][0] != one_curve[0][0]
            for a, b in zip(one_curve, two_curve, strict=True):
                assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


def evaluation_gives_the_same_metrics(twos, one, folder):
    for name, metrics in one("evaluate").items():
        found, other = twos["evaluate"][name]
        assert metrics == pytest.approx(found, rel=1e-5) and found == other
        assert metrics["decoding_accuracy"] == pytest.approx(0.6)


def trajectories_are_the_same(twos, one, folder):
    for name, (found, other) in twos["trajectories"].items():
        assert found == other and [row["prompt"] for row in found] == [f"Sam has {i} books. " for i in range(7)]
        for shard in list((folder / name / "trajectories").glob("*.arrow"))[1:]:
            shard.unlink()
    for name, rows in one("trajectories").items():  # goes on with a shard of two processes
        assert rows == twos["trajectories"][name][0]


def a_sharded_model_gives_the_same_loss_gradients_and_tokens(twos, one, folder):
    """FSDP2: the positions are gathered inside `forward`, so that the head's weights are there when it is applied."""
    for result in itertools.chain(*twos["shard"].values()):
        for whole, sharded in result["losses"]:
            assert whole == pytest.approx(sharded, abs=1e-5)
        assert result["gradients"] < 1e-5 and result["same_tokens"] and result["bfloat16"] == 0


def a_checkpoint_goes_on_under_another_layout(twos, one, folder):
    """Saved under FSDP2, resumed under DDP and by one process, and the other way round: weights, moments, rate."""
    both, single = launch(folder, "ddp")["ddp"], one("ddp")
    for name, family in ALL_FAMILIES.items():
        check_layouts(family, folder / name, twos["ddp"][name][0], twos["fsdp"][name][0], both[name][0], single[name])


def check_layouts(family, folder, plain, sharded, both, one):
    """Losses of DDP from the start, of FSDP2 from the start and from DDP's checkpoint, and of DDP and of one process
    from FSDP2's."""
    assert [len(plain), len(sharded), len(both), len(one)] == [2, 4, 2, 2]
    for kind in ("full", "adapter"):
        unbroken = plain[f"{kind}, unbroken"]
        assert len(unbroken) == 6 and unbroken[0] != unbroken[-1]
        resumed = [curves[f"{kind}, resumed"] for curves in (sharded, both, one)]
        for curve in (sharded[f"{kind}, unbroken"], *resumed):
            assert curve == pytest.approx(unbroken, rel=1e-5)
    saved = folder / "fsdp-full" / "checkpoint-6"
    model = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
    assert type(model).__name__ == family.model.__name__ and (saved / f"modeling_{family.name}.py").exists()
    weights = load_file(folder / "ddp-full" / "checkpoint-6" / "model.safetensors")
    for name, weight in load_file(saved / "model.safetensors").items():
        torch.testing.assert_close(weight, weights[name], atol=1e-5, rtol=1e-4)


def a_sharded_model_with_an_adapter_decodes(twos, one, folder):
    for whole, sharded in itertools.chain(*twos["shard_adapter"].values()):
        assert whole == pytest.approx(sharded) and whole["nfe"] > 1
