"""Fine-tune a diffusion language model with LLaDA's objective: rows of a dataset in, a model out.

Rows have `prompt` and `completion` (text or messages), `messages` or `text`, as TRL's. An autoregressive checkpoint
becomes a diffusion model by `examples/from_autoregressive.py` first. Started again after a kill, it goes on from the
last checkpoint, if nothing that decides the training was changed. OUTPUT_DIR/merged is the plain model, with remote
code and tokenizer.

`--config FILE` takes settings from a file, such as examples/gsm8k/fine_tune.yaml; flags take precedence over it.
On one GPU or on a CPU (there with `--use_cpu true`), leave out `--config_file`.

    accelerate launch --config_file examples/accelerate_configs/ddp.yaml examples/fine_tune.py \\
        --model GSAI-ML/LLaDA-8B-Instruct --dtype bfloat16 --use_peft true --lora_r 128 --lora_target_modules all \\
        --dataset_name trl-lib/Capybara --max_length 512 --output_dir runs/tuned
"""

from dataclasses import dataclass, field

import torch
from accelerate import PartialState
from distill import build_trainer, check_eval_size, train_and_merge
from generate_trajectories import DatasetArguments, ModelArguments, load_rows, parse_arguments

from dparallel.hub_cards.command_line import plain_errors
from dparallel.trainer import MaskedDiffusionConfig, MaskedDiffusionTrainer


@dataclass
class FineTuneArguments(DatasetArguments):
    eval_size: int = field(default=0, metadata={"help": "Number of rows that are held out for evaluation."})


def main():
    arguments, config, model_arguments = parse_arguments(
        __doc__, FineTuneArguments, MaskedDiffusionConfig, ModelArguments
    )
    PartialState(cpu=not torch.cuda.is_available())
    with plain_errors(ValueError, OSError):
        rows = load_rows(arguments)
        check_eval_size(arguments, rows)
        trainer = build_trainer(MaskedDiffusionTrainer, arguments, model_arguments, config, rows)
    train_and_merge(trainer, model_arguments, "fine-tuned")


if __name__ == "__main__":
    main()
