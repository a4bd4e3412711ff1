"""Accuracy and forward passes of a model on the held-out word problems.

The task is also one for `dparallel.evaluation.sweep` and `calibrate`: `--task` with this file and `:WORD_PROBLEMS`.

    python examples/word_problems/evaluate_word_problems.py --model examples/word_problems/student --limit 64
    accelerate launch examples/word_problems/evaluate_word_problems.py --model examples/word_problems/student
"""

import functools

from datasets import Dataset
from problems import NUM_TEST_PROBLEMS, TEST_SEED, generate_problems, is_correct

from dparallel.evaluation import Task, evaluate_from_command_line

SEEDS = {"test": TEST_SEED, "validation": 123}


class GeneratedTask(Task):
    """Rows come from the generator."""

    def load(self, split=None, data=None):
        split = split or self.split
        if data is not None:
            raise ValueError(f"`data={str(data)!r}` is not allowed for {self.name}: they are generated.")
        if split not in SEEDS:
            raise ValueError(f"`split={split!r}` is not allowed: it must be one of {sorted(SEEDS)}.")
        return generated(split)


@functools.cache
def generated(split):
    problems = generate_problems(split, NUM_TEST_PROBLEMS, SEEDS[split])
    return Dataset.from_list([problem._asdict() for problem in problems])


WORD_PROBLEMS = GeneratedTask(
    name="Word problems",
    dataset="word-problems",
    columns=("question", "answer"),
    ask=lambda row: row["question"],
    is_right=lambda row, text: is_correct(text, row["answer"]),
    max_new_tokens=128,
    calibration_split="validation",
)

if __name__ == "__main__":
    evaluate_from_command_line(WORD_PROBLEMS)
