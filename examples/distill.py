"""Certainty-forcing distillation: prompts, or trajectories, in; a merged model out.

A dataset that has answers (`completion`, `messages`, or the columns of `generate_trajectories.py`) is learned as it
is. One with prompts alone is answered by the model first, into OUTPUT_DIR/trajectories, which `push_dataset` takes.
Answers that were judged wrong are left out. Started again after a kill, it goes on from the last checkpoint, if
nothing that decides the training was changed. OUTPUT_DIR/merged is the plain model, with remote code, tokenizer, and
the policy and threshold that it was distilled for.

`--config FILE` takes settings from a recipe of examples/recipes; flags take precedence over it. On one GPU or on a CPU
(there with `--use_cpu true --dtype float32`), leave out `--config_file`.

    accelerate launch --config_file examples/accelerate_configs/ddp.yaml examples/distill.py \\
        --config examples/recipes/llada_8b.yaml --output_dir runs/llada
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from generate_trajectories import (
    ModelArguments,
    PromptArguments,
    as_prompts,
    init_kwargs,
    load_judge,
    load_rows,
    parse_arguments,
    teacher_trajectories,
)
from transformers import AutoTokenizer, IntervalStrategy, TrainerState
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config
from transformers.trainer import TRAINER_STATE_NAME
from trl import get_peft_config

from dparallel.hub_cards import merge_adapter
from dparallel.hub_cards.command_line import plain_errors
from dparallel.trainer import CertaintyForcingConfig, CertaintyForcingTrainer, last_complete_checkpoint


@dataclass
class DistillArguments(PromptArguments):
    teacher_generation_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Arguments of `generate()` for the teacher's answers to prompts, a mapping in a recipe or JSON: "
            'for example {"unmasking": "entropy_threshold", "threshold": 0.1, "max_new_tokens": 256} (default: one '
            "token a pass, and as many tokens as the teacher's generation_config.json says, or 256)."
        },
    )
    teacher_batch_size: int = field(
        default=16, metadata={"help": "Number of prompts that each process answers at a time."}
    )
    eval_size: int = field(
        default=0, metadata={"help": "Number of examples with right answers that are held out for evaluation."}
    )

    def __post_init__(self):
        given = self.teacher_generation_kwargs
        try:
            self.teacher_generation_kwargs = json.loads(given) if isinstance(given, str) else dict(given or {})
        except ValueError as error:
            raise ValueError(f"`teacher_generation_kwargs={given!r}` is not allowed: it must be JSON.") from error


def has_answers(rows) -> bool:
    return bool({"completion", "messages", "input_ids"} & set(rows.column_names))


def load_answers_or_prompts(arguments):
    rows = load_rows(arguments)
    if has_answers(rows):
        return rows
    if is_deepspeed_zero3_enabled():
        raise ValueError("Under ZeRO-3 the model is in parts: answer the prompts first, by generate_trajectories.py.")
    return as_prompts(arguments, rows)


def right_answers(arguments, rows):
    """Without the answers that were judged wrong."""
    if "correct" in rows.column_names and any(correct is not None for correct in rows["correct"][:]):
        kept = rows.filter(lambda row: row["correct"])
        if PartialState().is_main_process:
            print(f"{len(kept)} of {len(rows)} answers are right; the others are left out.")
        if len(kept) == 0:
            raise ValueError("No answer is right: look at the column `response`, and at `judge`.")
        rows = kept
    check_eval_size(arguments, rows)
    return rows


def check_eval_size(arguments, rows):
    """Something must be left to learn from: looked at before prompts are answered, and when answers were left out."""
    if not 0 <= arguments.eval_size < len(rows):
        raise ValueError(
            f"`eval_size={arguments.eval_size}` is not allowed: it must be less than the number of examples, "
            f"{len(rows)}. `--eval_size` takes precedence over a recipe's."
        )


def step_of(checkpoint):
    """The number of steps that a checkpoint has made."""
    return TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)).global_step


def build_trainer(trainer_class, arguments, model_arguments, config, rows, **own):
    """A trainer of the model that `model_arguments` name, on rows less those that are held out for evaluation; `own`
    are arguments of that trainer alone."""
    held_out = None
    if arguments.eval_size:
        split = rows.train_test_split(arguments.eval_size, seed=config.seed)
        rows, held_out = split["train"], split["test"]
    else:  # nothing to evaluate with, whatever a recipe says
        config.eval_strategy, config.load_best_model_at_end = IntervalStrategy.NO, False
    config.model_init_kwargs = {**init_kwargs(model_arguments), **(config.model_init_kwargs or {})}
    name, revision = model_arguments.model_name_or_path, model_arguments.model_revision
    return trainer_class(
        model=name,
        args=config,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=AutoTokenizer.from_pretrained(name, revision=revision),
        peft_config=get_peft_config(model_arguments),
        **own,
    )


def train_and_merge(trainer, model_arguments, what):
    """Train, from the last checkpoint on where there is one, and save the plain model in OUTPUT_DIR/merged."""
    config = trainer.args
    checkpoint = config.resume_from_checkpoint or last_complete_checkpoint(config.output_dir)
    if checkpoint and trainer.accelerator.is_main_process:
        print(f"Going on from {checkpoint}. To train anew, choose another `output_dir`.")
    with plain_errors(ValueError):
        trainer.train(resume_from_checkpoint=checkpoint)
    merged = Path(config.output_dir) / "merged"
    is_merged = all((merged / name).exists() for name in ("config.json", "tokenizer_config.json"))
    if checkpoint and step_of(checkpoint) == trainer.state.global_step and is_merged:
        if trainer.accelerator.is_main_process:  # a threshold may have been calibrated since
            print(f"The training had ended before: {merged} is left as it is.")
        return
    if trainer.state.best_model_checkpoint and config.load_best_model_at_end and trainer.accelerator.is_main_process:
        print(f"The best checkpoint is {trainer.state.best_model_checkpoint}.")

    trainer.save_model(config.output_dir if model_arguments.use_peft else str(merged))
    unset_hf_deepspeed_config()  # else ZeRO-3 would load the base in parts, on all processes together
    if model_arguments.use_peft and trainer.accelerator.is_main_process:
        # From the folder: what is in memory may be spread over the processes, or quantized.
        given = config.model_init_kwargs or {}
        whole = {k: v for k, v in given.items() if k not in ("quantization_config", "device_map")}
        merge_adapter(config.output_dir, merged, trainer.processing_class, model_init_kwargs=whole)
    trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.is_main_process:
        print(
            f"In {merged}: the {what} model. Next, to evaluate it on GSM8K: accelerate launch "
            f"examples/gsm8k/evaluate_gsm8k.py --model {merged} --output_dir {Path(config.output_dir) / 'gsm8k'}"
        )


def main():
    arguments, config, model_arguments = parse_arguments(
        __doc__, DistillArguments, CertaintyForcingConfig, ModelArguments
    )
    PartialState(cpu=not torch.cuda.is_available())
    with plain_errors(ValueError, OSError):
        rows, judge = load_answers_or_prompts(arguments), load_judge(arguments.judge)
        check_eval_size(arguments, rows)
    if not has_answers(rows):
        arguments.trajectories_dir = arguments.trajectories_dir or str(Path(config.output_dir) / "trajectories")
        rows = teacher_trajectories(
            arguments,
            model_arguments,
            rows,
            judge,
            arguments.teacher_batch_size,
            **arguments.teacher_generation_kwargs,
        )
    with plain_errors(ValueError):
        rows = right_answers(arguments, rows)
    trainer = build_trainer(CertaintyForcingTrainer, arguments, model_arguments, config, rows, judge=judge)
    train_and_merge(trainer, model_arguments, "distilled")


if __name__ == "__main__":
    main()
