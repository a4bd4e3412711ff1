"""The benchmarks measure what they say."""

import json

import pytest
import torch

from tests import scripts
from tests.families import FAMILIES

decoding = scripts.load("benchmarks/decoding.py")
SCALE_OUT = "benchmarks/scale_out.py"


@pytest.fixture(scope="module")
def llada():
    return FAMILIES["llada"].load()


def test_the_plain_loop_decodes_what_generate_does(llada):
    prompts = torch.randint(0, 317, (3, 7), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 64, "unmasking": "confidence", "steps": 16, "stop_at_eos": False}
    assert torch.equal(decoding.plain_loop(llada, prompts, 64, 16), llada.generate(prompts, **settings))


def test_floors(llada):
    """By hand: 3 blocks of 4 * 64 * 64 + 3 * 64 * 128 weights and 7 norms of 64; a head of 320 * 64."""
    blocks, head = 3 * (4 * 64 * 64 + 3 * 64 * 128) + 7 * 64, 320 * 64
    reading = {"bytes_per_second": 1e3, "operations_per_second": 1e30}
    assert decoding.floor(llada, reading, 2, 32, 100) == pytest.approx(4 * (blocks + head) / 1e3)
    products = {"bytes_per_second": 1e30, "operations_per_second": 1e3}
    attention = 2 * 3 * 2 * 64 * 100 * 64  # scores and mixing, 3 blocks, 100 keys, 64 queries
    expected = 2 * 64 * blocks + 2 * 64 * head + attention
    assert decoding.floor(llada, products, 2, 32, 100) == pytest.approx(expected / 1e3)
    ceilings = {"bytes_per_second": 1e30, "operations_per_second": 1e3}
    whole = decoding.floor(llada, ceilings, 1, 74, 74)
    block, two = (decoding.floor(llada, ceilings, 1, n, 74) for n in (32, 64))
    found = decoding.floor_of_all(llada, ceilings, 1, 10, 64, 6, "dual", "previous_block")
    assert found == pytest.approx(whole + two + 4 * block)
    assert decoding.floor_of_all(llada, ceilings, 1, 10, 64, 6, "none", "") == pytest.approx(6 * whole)
    parts = [(42, 42), (32, 42), (32, 42), (64, 74), (32, 74), (32, 74)]
    expected = sum(decoding.floor(llada, ceilings, 1, *part) for part in parts)
    assert decoding.floor_of_all(llada, ceilings, 1, 10, 64, 6, "exact", "") == pytest.approx(expected)


def run(script, flags, tmp_path):
    """Its rows, and what it printed."""
    result = scripts.call(script, *flags.split(), "--output", tmp_path / "out.json")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith(f"In {tmp_path / 'out.json'}: every row. Next, ")
    return json.loads((tmp_path / "out.json").read_text())["rows"], result.stdout


def test_the_decoding_benchmark_runs(tmp_path):
    flags = "--shape example --batch_sizes 2 --prompt_lengths 8 --length 32 --passes 2 --repeats 1"
    rows, printed = run("benchmarks/decoding.py", flags, tmp_path)
    assert [row["decoding"] for row in rows] == [
        "plain loop",
        "none",
        "prefix",
        "dual",
        "dual,previous_block",
        "exact",
    ]
    assert all(0 < row["floor"] and 0 < row["seconds"] for row in rows)
    assert printed.count("| 2 | 8 | 2 |") == 6


@pytest.mark.slow
def test_the_training_benchmark_runs(tmp_path):
    flags = "--shape example --micro_batches 2 --length 160 --rank 4 --steps 1 --warm_up 1 --kinds plain trainer"
    rows, _ = run("benchmarks/training.py", flags, tmp_path)
    assert [row["kind"] for row in rows] == ["plain", "trainer"]
    assert all(0 < row["floor"] and 0 < row["seconds"] for row in rows)


@pytest.mark.slow
def test_the_benchmark_of_several_devices_runs(tmp_path):
    flags = (
        "--shape example --processes 2 --steps 1 --warm_up 1 --global_batch 4 --micro_batch 2 --prompts 6 --answer 8"
    )
    flags = [*flags.split(), "--decoding_batch", "2"]
    result = scripts.run(SCALE_OUT, *flags, "--output", tmp_path / "out.json")
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "out.json").read_text())
    assert [row["processes"] for row in results["training"]] == [1, 2]
    assert results["training"][1]["difference"] < 1e-4 and results["training"][1]["efficiency"] > 0
    assert [row["same_answers"] for row in results["decoding"]] == [True, True]
    (row,) = results["checkpoints"]
    assert (row["saved"], row["resumed"]) == ("ddp", "single_gpu")
    assert max(row["losses_difference"], row["difference"], row["layouts"]) < 1e-4
    flags += ["--parts", "training", "--layouts", "ddp", "--rank", "0", "--output", tmp_path / "failed.json"]
    result = scripts.run(SCALE_OUT, *flags)
    assert result.returncode == 1 and "failed: LoRA-ddp" in result.stderr
    assert json.loads((tmp_path / "failed.json").read_text())["failed"] == ["LoRA-ddp"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--processes 1", "--processes 1: it must be at least 2"),
        ("--processes 2 --global_batch 6", "--global_batch 6: it must be a multiple of --micro_batch times"),
    ],
)
def test_the_benchmark_of_several_devices_refuses(flags, message):
    result = scripts.call(SCALE_OUT, *flags.split())
    assert result.returncode == 2 and message in result.stderr


@pytest.mark.slow
def test_the_table_of_caches_is_made(tmp_path):
    rows, _ = run("word_problems/caches.py", "--problems 2 --batch_size 2", tmp_path)
    by_name = {(row["model"], row["cache"]): row for row in rows}
    assert len(rows) == len(by_name) == 16
    for model in ("teacher", "student"):
        exact, same = by_name[model, "none"], by_name[model, "dual, every pass"]
        assert exact["nfe"] == same["nfe"] and same["difference"].startswith("+0.0 (")
