"""Accuracy and forward passes of a model on MATH, on one process or many.

Started again after a kill, it goes on where it was.

    accelerate launch examples/math/evaluate_math.py --model user/repo --unmasking entropy_threshold --threshold 0.5
"""

from dparallel.evaluation import MATH, evaluate_from_command_line

if __name__ == "__main__":
    evaluate_from_command_line(MATH)
