"""Teach the two example models, a teacher and its distilled student, answers of all lengths.

They were trained on answers of 128 tokens, end-of-text padding included, and solve few problems in a canvas of 64 or
of 256. Dropping what is behind a predicted end, or decoding up to 1,024 tokens, needs models that know such canvases.
The teacher goes on with its own training, each answer filled up with end-of-text to a length drawn from `--lengths`;
the student with its distillation, on that teacher's right answers. Both are saved to be studied; the example
models of the repository stay as they are. The first command is for a GPU, the second a try on a CPU.

    python examples/word_problems/any_length.py --output_dir runs/any_length
    python examples/word_problems/any_length.py --problems 64 --max_steps 2 2 --batch_size 4 --lengths 64 96
"""

from itertools import islice
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from distillation import ANY_RATIO, TRAINING, judge, to_prompt
from problems import generate_problems, to_conversation
from solving import ANSWER_LENGTH, evaluate, load_model
from transformers import AutoTokenizer

from dparallel.hub_cards.command_line import CommandParser
from dparallel.modeling import LLaDAModelLM
from dparallel.trainer import (
    CertaintyForcingConfig,
    CertaintyForcingTrainer,
    MaskedDiffusionConfig,
    MaskedDiffusionTrainer,
    generate_trajectories,
)
from dparallel.trainer.tokenization import tokenize_example

HERE = Path(__file__).parent
SEED = 31


def fill_up(rows, lengths, eos_token_id):
    """`input_ids` and `prompt_length`, with responses of random lengths; of the same ones in each run."""
    drawn = np.random.default_rng(SEED).choice(lengths, size=len(rows)).tolist()

    def fill_row(row, number):
        ids, start = row["input_ids"], row["prompt_length"]
        return {"input_ids": [*ids, *[eos_token_id] * (drawn[number] - (len(ids) - start))], "prompt_length": start}

    return rows.map(fill_row, with_indices=True, remove_columns=rows.column_names)


def train(trainer_class, config_class, source, rows, tokenizer, target, batch_size, max_steps, **settings):
    config = config_class(
        output_dir=str(target / "training"),
        max_length=None,
        block_length=32,
        train_sampling_strategy="group_by_length",
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        warmup_steps=0.05,
        **TRAINING,
        **settings,
    )
    model = LLaDAModelLM.from_pretrained(source, dtype=torch.float32)
    trainer_class(model, config, train_dataset=rows, processing_class=tokenizer).train()
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


def main():
    parser = CommandParser(__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/any_length"), help="folder for both models")
    parser.add_argument("--problems", type=int, default=50_000, help="number of problems to train each model with")
    parser.add_argument(
        "--max_steps", type=int, nargs=2, default=[800, 500], help="optimizer steps of the teacher, and of the student"
    )
    parser.add_argument(
        "--batch_size", type=int, default=256, help="examples of a step of the teacher; the student takes half as many"
    )
    lengths = [64, 96, 128, 192, 256, 384, 512, 768, 1024]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths, help="lengths of answers, in tokens")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(HERE / "checkpoint", padding_side="left")
    problems = list(islice(generate_problems("train", arguments.problems, SEED), arguments.problems))
    held_out = list(islice(generate_problems("validation", 500, SEED), min(500, arguments.problems)))
    teacher, student = arguments.output_dir / "teacher", arguments.output_dir / "student"

    def report(path, **decoding):
        model = load_model(path)
        for length in (min(arguments.lengths), ANSWER_LENGTH, max(arguments.lengths)):
            result = evaluate(model, tokenizer, held_out, path.name, 128, max_new_tokens=length, **decoding)
            print(f"{path.name}, answers of up to {length}: {100 * result.accuracy:.1f}% in {result.nfe:.1f} passes")

    if not (teacher / "config.json").exists():
        rows = Dataset.from_list([tokenize_example(to_conversation(problem), tokenizer) for problem in problems])
        rows = fill_up(rows, arguments.lengths, tokenizer.eos_token_id)
        classes = (MaskedDiffusionTrainer, MaskedDiffusionConfig)
        train(
            *classes, HERE / "checkpoint", rows, tokenizer, teacher, arguments.batch_size, arguments.max_steps[0],
            learning_rate=5e-4, loss_weighting="token",
        )  # fmt: skip
    report(teacher, unmasking="entropy_threshold", threshold=0.1)
    if not (student / "config.json").exists():
        rows = generate_trajectories(
            load_model(teacher), tokenizer, Dataset.from_list([to_prompt(problem) for problem in problems]),
            arguments.output_dir / "answers", judge,
            batch_size=1024, shard_size=8192, max_new_tokens=ANSWER_LENGTH,
            unmasking="entropy_threshold", threshold=0.1,
        )  # fmt: skip
        rows = rows.filter(lambda row: row["correct"]).select_columns(["input_ids", "prompt_length"])
        rows = fill_up(rows, arguments.lengths, tokenizer.eos_token_id)
        classes = (CertaintyForcingTrainer, CertaintyForcingConfig)
        train(  # it sees two views of each example: the same memory
            *classes, HERE / "student", rows, tokenizer, student, arguments.batch_size // 2, arguments.max_steps[1],
            learning_rate=2e-4, **ANY_RATIO,
        )  # fmt: skip
    report(student)
    command = f"python examples/word_problems/learned_filter.py --models {arguments.output_dir}"
    print(f"In {arguments.output_dir}: teacher and student. Next, to compare filters on them: {command}")


if __name__ == "__main__":
    main()
