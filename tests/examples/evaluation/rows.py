"""Real benchmark rows, where they are; and rows of our own in their schema, which are always there."""

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("DPARALLEL_DATA", Path(__file__).parents[4] / "shared" / "data"))
real_rows = pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the benchmarks' rows, of which {DATA} has none")
QUESTIONS = [
    {
        "question": "Nora has 12 shells. Nora finds 8 more shells. How many shells are left?",
        "answer": "12 + 8\n#### 20",
    },
    {"question": "Sam has 9 books. Sam loses 4 books. How many books are left?", "answer": "9 - 4\n#### 5"},
    {"question": "Sam has 9 books. Sam buys 3 more books. How many books are left?", "answer": "9 + 3\n#### 12"},
]
PROGRAM = {
    "text": "Write a function to double a number.", "code": "def double(x):\n    return 2 * x", "task_id": 11,
    "test_setup_code": "", "test_list": ["assert double(2) == 4", "assert double(-1) == -2"],
    "challenge_test_list": [],
}  # fmt: skip
FUNCTION = {
    "task_id": "Own/0", "entry_point": "double", "canonical_solution": "    return 2 * x\n",
    "prompt": 'import math\n\n\ndef half(x):\n    return x / 2\n\n\ndef double(x):\n    """Twice x."""\n',
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(half(3)) == 3\n",
}  # fmt: skip
