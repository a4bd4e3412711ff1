"""An autoregressive model on the tests of `rows.py`, for comparison: accuracy, and tokens per second.

It decodes greedily by transformers' own `generate()`: on a GPU with a static cache, so that transformers compiles and
captures a pass. All prompts are filled up to one width, so that this happens once, before the clock starts. Speed is
measured on the first `--speed_problems` of GSM8K, accuracy on all problems of each test, at the largest batch size.
Writes `results.json`. The first command, TRL's, trains such a model.

    trl sft --config examples/gsm8k/autoregressive.yaml
    python examples/gsm8k/evaluate_autoregressive.py --model runs/gsm8k/autoregressive --rows runs/gsm8k/rows
"""

import json
import time
from pathlib import Path

import torch
from rows import GSM8K_REST, SYMBOLIC_SEEN, SYMBOLIC_UNSEEN
from transformers import AutoModelForCausalLM, AutoTokenizer

from dparallel.evaluation.evaluation import origin_of, write_measurements
from dparallel.hub_cards.command_line import CommandParser, plain_errors
from dparallel.hub_cards.measurements import RESULTS_FILE, Measurement, here_and_now
from dparallel.trainer.tokenization import tokenize_prompt

TASKS = (GSM8K_REST, SYMBOLIC_SEEN, SYMBOLIC_UNSEEN)
WIDTH_BUCKET = 32


class Answers:
    """Of a model, to questions, so many at a time."""

    def __init__(self, model, tokenizer, questions, batch_size, max_new_tokens):
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.prompts = [tokenize_prompt(question, tokenizer) for question in questions]
        self.width = -(-max(map(len, self.prompts)) // WIDTH_BUCKET) * WIDTH_BUCKET
        captured = {"cache_implementation": "static"} if model.device.type == "cuda" else {}
        self.settings = {"do_sample": False, "max_new_tokens": max_new_tokens, **captured}
        ends = model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])

    def batch(self, first):
        """The tokens of the answers from `first` on, each up to and including its end-of-text."""
        prompts = self.prompts[first : first + self.batch_size]
        full = prompts + [prompts[-1]] * (self.batch_size - len(prompts))  # of one shape, as the others
        inputs = self.tokenizer.pad(
            {"input_ids": full}, padding="max_length", max_length=self.width, padding_side="left", return_tensors="pt"
        )
        output = self.model.generate(**inputs.to(self.model.device), **self.settings)
        for row in output[: len(prompts), self.width :].tolist():
            end = next((i + 1 for i, token in enumerate(row) if token in self.ends), len(row))
            yield row[:end]

    def all(self):
        """Texts, numbers of tokens, and the seconds that they took."""
        list(self.batch(0))  # warm-up
        start = time.perf_counter()
        rows = [row for first in range(0, len(self.prompts), self.batch_size) for row in self.batch(first)]
        seconds = time.perf_counter() - start
        texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        return texts, [len(row) for row in rows], seconds


def measure(task, model, tokenizer, rows, batch_size, limit):
    questions = task.questions(data=rows, limit=limit)
    texts, tokens, seconds = Answers(model, tokenizer, questions, batch_size, task.max_new_tokens).all()
    right = [task.is_right(json.loads(row), text) for row, text in zip(questions["row"], texts, strict=True)]
    return Measurement(
        task=task.name,
        dataset=task.dataset,
        split=task.split,
        num_examples=len(right),
        decoding={"batch_size": batch_size},
        accuracy=sum(right) / len(right),
        nfe=sum(tokens) / len(tokens),
        tpf=1.0,
        seconds=seconds,
        **origin_of(model),
        **here_and_now(),
    )


def main():
    parser = CommandParser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of an autoregressive model")
    parser.add_argument("--rows", type=Path, required=True, help="folder that rows.py wrote")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 64], help="numbers of answers at a time")
    parser.add_argument("--speed_problems", type=int, default=64, help="problems that speed is measured on")
    parser.add_argument("--limit", type=int, help="problems of each test, from the first on (default: all)")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/gsm8k/autoregressive_results"), help="folder for the results"
    )
    arguments = parser.parse_args()
    if min(arguments.batch_sizes) < 1:
        parser.error(f"--batch_sizes {arguments.batch_sizes}: each must be at least 1")
    with plain_errors(ValueError, OSError):
        for task in TASKS:
            task.questions(data=arguments.rows, limit=1)
        is_gpu = torch.cuda.is_available()
        dtype = torch.bfloat16 if is_gpu else torch.float32
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).eval()
        model.to("cuda" if is_gpu else "cpu")
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        jobs = [(GSM8K_REST, size, arguments.speed_problems) for size in arguments.batch_sizes]
        jobs += [(task, max(arguments.batch_sizes), arguments.limit) for task in TASKS]
        points = []
        print("| test | problems | answers at a time | tokens | tokens/s | accuracy % (95% interval) |")
        print("| --- " * 6 + "|")
        for task, size, limit in jobs:
            point = measure(task, model, tokenizer, arguments.rows, size, limit)
            points.append(point)
            print(
                f"| {point.task} | {point.num_examples} | {size} | {point.nfe:.1f} | {point.tokens_per_second:,.0f} | "
                f"{point.accuracy_in_words} |",
                flush=True,
            )
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    write_measurements(points, arguments.output_dir / RESULTS_FILE)
    print(
        f"In {arguments.output_dir}: {RESULTS_FILE}. Next, the diffusion model's: python examples/gsm8k/study.py "
        f"--teacher runs/gsm8k/teacher/merged --rows {arguments.rows} --output_dir runs/gsm8k/study"
    )


if __name__ == "__main__":
    main()
