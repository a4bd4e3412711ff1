"""Accuracy and forward passes of a model on MBPP, on one process or many.

Started again after a kill, it goes on where it was.

    export HF_ALLOW_CODE_EVAL=1   # programs that a model wrote are run, in a sandbox
    accelerate launch examples/mbpp/evaluate_mbpp.py --model user/repo --unmasking entropy_threshold --threshold 0.5
"""

from dparallel.evaluation import MBPP, evaluate_from_command_line

if __name__ == "__main__":
    evaluate_from_command_line(MBPP)
