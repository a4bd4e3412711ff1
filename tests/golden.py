"""The golden files: made by running the published code on tiny random models, with tokens, passes and logits."""

import json
from pathlib import Path

from safetensors.torch import load_file

FIXTURES = Path(__file__).parent / "fixtures"
CHECKPOINT = Path(__file__).parents[1] / "examples" / "word_problems" / "checkpoint"
STUDENT = CHECKPOINT.parent / "student"


def load_cases(name):
    """The list of cases of a golden file, and its tensors."""
    cases = json.loads((FIXTURES / "cases" / f"{name}.json").read_text())["cases"]
    return cases, load_file(FIXTURES / "cases" / f"{name}.safetensors")
