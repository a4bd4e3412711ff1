"""Is an answer right? Functions of a row of a trajectory dataset, for `--judge examples/judges.py:NAME`."""

from dparallel.evaluation.metrics import same_number


def final_number(row):
    """The response ends up with the number of the row's `answer`, as in GSM8K (see `evaluation.answers`)."""
    return same_number(row["response"], str(row["answer"]))
