"""How accurate a model is, and how many forward passes that takes."""

try:
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
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'No module named {error.name!r}: install it by `pip install ".[eval]"` in a checkout of dparallel.',
        name=error.name,
    ) from error

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
