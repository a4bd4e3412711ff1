"""Accuracy and forward passes of a model on GSM8K, on one process or many.

Started again after a kill, it goes on where it was.

    accelerate launch examples/gsm8k/evaluate_gsm8k.py --model user/repo --unmasking entropy_threshold --threshold 0.5
"""

from dparallel.evaluation import GSM8K, evaluate_from_command_line

if __name__ == "__main__":
    evaluate_from_command_line(GSM8K)
