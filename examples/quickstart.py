"""Solve word problems with a diffusion language model and with its distilled student: one live, then a table.

Without `--model` these are the two example models of this repository, a teacher and the student that was distilled
from it: `checkpoint` and `student` in `examples/word_problems`. They take a minute or two on a CPU. All 5,000
held-out problems are for a GPU.

    python examples/quickstart.py
    python examples/quickstart.py --problems 5000
    python examples/quickstart.py --model user/repo
"""

import os
import sys
import time
from itertools import islice
from pathlib import Path

# Threads that wait for each other spin, by default for milliseconds. On cores that have other work, too, a pass then
# takes 462 ms instead of 47 (two threads, a busy loop on each of two cores). It is read when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

sys.path.insert(0, str(Path(__file__).parent / "word_problems"))
from problems import NUM_TEST_PROBLEMS, TEST_SEED, generate_problems
from solving import ANSWER_LENGTH, evaluate

from dparallel.hub_cards import here_and_now
from dparallel.hub_cards.command_line import CommandParser, plain_errors
from dparallel.hub_cards.hub_ids import check_folder_or_hub_id
from dparallel.modeling import POLICIES  # registers the models too: official repositories' own code is older

FOLDER = Path(__file__).parent / "word_problems"
MODELS = {"teacher": FOLDER / "checkpoint", "student": FOLDER / "student"}
DECODINGS = [
    {"unmasking": "confidence", "steps": ANSWER_LENGTH},
    {"unmasking": "confidence", "steps": ANSWER_LENGTH // 4},
    {"unmasking": "confidence_threshold", "threshold": 0.95},
    {"unmasking": "confidence_threshold", "threshold": 0.9},
    {"unmasking": "confidence_factor", "threshold": 1.0},
    {"unmasking": "entropy_threshold", "threshold": 0.1},
    {"unmasking": "entropy_bound", "threshold": 0.1},
]


class LiveCanvas(BaseStreamer):
    """Shows the answer after every pass, a dot for each masked token: in place on a terminal, else line by line."""

    def __init__(self, tokenizer, mask_token_id):
        self.tokenizer, self.mask_token_id = tokenizer, mask_token_id
        self.decided, self.is_terminal = None, sys.stdout.isatty()

    def show(self, draft):
        words = [
            " ·" if i == self.mask_token_id else self.tokenizer.decode([i], skip_special_tokens=True) for i in draft
        ]
        text = self.tokenizer.decode(self.decided, skip_special_tokens=True) + "".join(words)
        if self.is_terminal:
            print(f"\0338\033[J{text}", end="", flush=True)
            time.sleep(0.1)
        else:
            print("  " + text, flush=True)

    def put(self, value):
        if self.decided is not None:
            self.decided += value.tolist()
            return
        self.decided = []  # the prompt came
        if self.is_terminal:  # make room below, then remember this place
            print("\n" * 6 + "\033[6A\0337", end="")

    def put_draft(self, value, **kwargs):
        self.show(value.tolist())

    def end(self):
        self.show([])
        print()


def show_live(name, model, tokenizer, problem):
    print(f"\nThe {name}'s answer, as the canvas fills in:")
    messages = [{"role": "user", "content": problem.question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(
        **inputs.to(model.device),
        max_new_tokens=ANSWER_LENGTH,
        streamer=LiveCanvas(tokenizer, model.config.mask_token_id),
        return_dict_in_generate=True,
    )
    tokens, passes = output.num_tokens.item(), output.num_forward_passes.item()
    print(f"{tokens} tokens in {passes} forward passes; the answer is {problem.answer}.")


def own_decoding(model):
    """The policy that the checkpoint was saved with, as a distilled one is; None if it names none."""
    config = model.generation_config
    if getattr(config, "unmasking", None) is None:
        return None
    resolved = model.resolve_generation_config()
    if POLICIES[config.unmasking].is_scheduled:
        return {"unmasking": config.unmasking, "steps": resolved.steps or ANSWER_LENGTH}
    return {"unmasking": config.unmasking, "threshold": resolved.threshold}


def table_row(model_name, result):
    low, high = result.interval
    name, setting = result.settings.values()
    key = list(result.settings)[1]
    return (
        f"| {model_name} | `{name}`, {key} {setting:g} | {result.nfe:.1f} | {result.tpf:.2f} | {result.seconds:.1f} | "
        f"{100 * result.accuracy:.1f} ({100 * low:.1f} to {100 * high:.1f}) |"
    )


def main():
    parser = CommandParser(__doc__)
    parser.add_argument("--model", help="Hub id or folder of a model (default: the two example models)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the Python code of that model")
    parser.add_argument("--problems", type=int, default=8, help="number of held-out problems, from 1 to 5000")
    parser.add_argument(
        "--batch_size",
        type=int,
        help="number of problems that are solved at a time (default: 4 on a CPU, 256 on a GPU)",
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="cpu, cuda, or a device's name such as cuda:1")
    parser.add_argument(
        "--dtype", default="float32", help="data type of the weights: float32, bfloat16, or auto for that of the file"
    )
    arguments = parser.parse_args()
    if not 1 <= arguments.problems <= NUM_TEST_PROBLEMS:
        parser.error(f"--problems {arguments.problems}: it must be from 1 to {NUM_TEST_PROBLEMS}")

    batch_size = arguments.batch_size or (4 if arguments.device == "cpu" else 256)
    paths = {"model": arguments.model} if arguments.model else MODELS
    trusted = {
        "trust_remote_code": arguments.trust_remote_code or not arguments.model
    }  # the example models have our own
    with plain_errors(ValueError, OSError):
        for path in paths.values():
            check_folder_or_hub_id("model", path)
        tokenizer = AutoTokenizer.from_pretrained(next(iter(paths.values())), **trusted, padding_side="left")
        models = {
            name: AutoModelForCausalLM.from_pretrained(path, **trusted, dtype=arguments.dtype)
            for name, path in paths.items()
        }
    models = {name: model.to(arguments.device).eval() for name, model in models.items()}
    problems = list(islice(generate_problems("test", NUM_TEST_PROBLEMS, TEST_SEED), arguments.problems))

    print(f"Question: {problems[0].question}")
    for name, model in models.items():
        show_live(name, model, tokenizer, problems[0])

    is_gpu = arguments.device.startswith("cuda")
    where = here_and_now(is_gpu=is_gpu)
    threads = "" if is_gpu else f", {torch.get_num_threads()} threads"
    print(
        f"\n{len(problems)} held-out problems, answers of up to {ANSWER_LENGTH} tokens, stopping at end-of-text, "
        f"batch size {batch_size}\n{where['hardware']}{threads}, {where['versions']}, {where['date']}\n"
    )
    print("| model | policy | NFE | TPF | seconds | accuracy % (95% interval) |\n" + "| --- " * 6 + "|", flush=True)
    for name, model in models.items():
        own = own_decoding(model)
        decodings = [own] if name == "student" else DECODINGS + ([own] if own else [])
        for settings in decodings:
            result = evaluate(model, tokenizer, problems, settings["unmasking"], batch_size, **settings)
            print(table_row(name, result), flush=True)
    print("\nNFE: forward passes per problem. TPF: tokens per forward pass, up to and including the end-of-text.")
    if arguments.problems < NUM_TEST_PROBLEMS:
        print(f"{arguments.problems} problems leave wide intervals; `--problems {NUM_TEST_PROBLEMS}` narrows them.")
    python = Path(sys.executable)  # the environment need not be active
    python = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else "python"
    print(f"Next, for a page that plays an answer pass by pass: {python} examples/visualize.py")


if __name__ == "__main__":
    main()
