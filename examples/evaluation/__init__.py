"""How accurate a model is, and how many forward passes that takes."""

from dparallel.hub_cards.command_line import needs_extra

with needs_extra("eval"):
    from .command_line import evaluate_from_command_line
    from .evaluation import evaluate_task
    from .metrics import (
        AccuracyUnderParallelism,
        DecodingEfficiency,
        MathAnswer,
        NumericAnswer,
        PassAtK,
        accuracy_under_parallelism,
    )
    from .tasks import GSM8K, HUMANEVAL, MATH, MBPP, TASKS, Task

__all__ = [
    "GSM8K",
    "HUMANEVAL",
    "MATH",
    "MBPP",
    "TASKS",
    "AccuracyUnderParallelism",
    "DecodingEfficiency",
    "MathAnswer",
    "NumericAnswer",
    "PassAtK",
    "Task",
    "accuracy_under_parallelism",
    "evaluate_from_command_line",
    "evaluate_task",
]
