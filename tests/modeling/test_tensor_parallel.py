"""`tp_plan="auto"`: each of two processes has a part of the projections."""

import json
from pathlib import Path

import pytest

from tests.families import ALL_FAMILIES
from tests.scripts import run


@pytest.mark.slow
def test_models_in_parts_are_those_of_one_piece(tmp_path):
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m"]
    result = run(*launcher, "tests.modeling.tensor_parallel", tmp_path, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stderr[-3000:]
    for rank in range(2):
        found = json.loads((tmp_path / f"process-{rank}.json").read_text())
        assert len(found) == 2 * len(ALL_FAMILIES)
        for name, each in found.items():
            assert each["parts"] >= 14 and each["difference"] < 1e-4 and each["same_tokens"], name
