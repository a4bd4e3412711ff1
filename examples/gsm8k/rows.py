"""Rows for models with real weights: GSM8K, and problems of GSM-Symbolic without end.

GSM-Symbolic (https://arxiv.org/abs/2410.05229) makes templates of questions of GSM8K's test set; the package
`reasoning-gym` has 85 of them, with worked answers. So that what a model has learned is measured, and not what it has
seen:

- A fifth of the templates, the *unseen* ones, is held out of training altogether, and so are rows of GSM8K's training
  set that are worded like one of them. Problems of the other templates are *seen*: worded as training problems are,
  with other numbers.
- GSM8K's test questions that are worded like any of the templates are taken out of the test.
- A problem that is tested is no training problem, not even with other names.

Written are `train.jsonl` (`prompt` and `completion`, messages, as trainers take them), `prompts.jsonl` (the same
problems, each once, as `question` and `answer`, for trajectories), `gsm8k_rest.jsonl`, `symbolic_seen.jsonl` and
`symbolic_unseen.jsonl`, which the tasks GSM8K_REST, SYMBOLIC_SEEN and SYMBOLIC_UNSEEN of this file read. What reads
the files does not need `reasoning-gym`, as the second command does: `pip install reasoning-gym==0.1.25`.

    python -m dparallel.evaluation.sweep --task examples/gsm8k/rows.py:SYMBOLIC_UNSEEN --data runs/gsm8k/rows \\
        --model runs/gsm8k/teacher/merged --output_dir runs/gsm8k/unseen --unmasking entropy_threshold=0.1,0.3
    python examples/gsm8k/rows.py --output_dir runs/gsm8k/rows
"""

import itertools
import json
import random
import re
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path

from dparallel.evaluation import GSM8K, Task
from dparallel.evaluation.metrics import same_number
from dparallel.hub_cards.command_line import CommandParser, plain_errors

UNITS = " Give the result as your final answer. Do not include units."  # the package's own, in each question
CALCULATION = re.compile(r"<<[^>]*>>")  # GSM8K's, for a calculator that a model would call
LIKE = 0.2  # of templates with the questions that they are of: 0.22 to 1; with others: 0.01 to 0.21 (one: 0.31)
SEEDS = {"likeness": 1, "seen": 2, "unseen": 3, "train": 4}
EXAMPLES_OF_A_TEMPLATE = 12
PART = 10_000  # problems that are drawn at a time


def _task(name, file):
    return Task(
        name=name,
        dataset=file,
        files={"test": file},
        columns=("question", "answer"),
        ask=lambda row: row["question"],
        is_right=lambda row, text: same_number(text, row["answer"]),
    )


GSM8K_REST = _task("GSM8K less the templates", "gsm8k_rest.jsonl")
SYMBOLIC_SEEN = _task("GSM-Symbolic, seen templates", "symbolic_seen.jsonl")
SYMBOLIC_UNSEEN = _task("GSM-Symbolic, unseen templates", "symbolic_unseen.jsonl")


def templates() -> tuple[list[int], list[int]]:
    """The numbers of the templates: those that are seen in training, and every fifth, which is not."""
    try:
        from reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic import tasks_ok
    except ImportError as error:
        raise ImportError(f"{error}: pip install reasoning-gym==0.1.25") from error
    unseen = tasks_ok[2::5]
    return [number for number in tasks_ok if number not in unseen], unseen


def problems(numbers: list[int], seed: int) -> Iterator[dict]:
    """Problems of these templates without end, each of another question: `question`, `answer` (worked, with the number
    behind `####`) and `template`."""
    from reasoning_gym import create_dataset

    questions, wanted = set(), set(numbers)
    for part in itertools.count():  # the package draws problem i by the seed plus i
        dataset = create_dataset("gsm_symbolic", size=PART, seed=seed * 1_000_000_000 + part * PART)
        for i, number in enumerate(dataset.task_indices):
            if number not in wanted:
                continue
            problem = dataset[i]
            question = problem["question"].removesuffix(UNITS).strip()
            if question not in questions:
                questions.add(question)
                answer = problem["metadata"]["answer_cot"].strip()
                yield {"question": question, "answer": answer, "template": number}


def numbers_of(problem: dict) -> tuple:
    """The template and all numbers of a question: who is asked about does not change its answer."""
    return problem["template"], *re.findall(r"\d+(?:[.,/]\d+)*", problem["question"])


def pairs_of_words(question: str) -> set[tuple[str, str]]:
    words = [word if word.isalpha() else "#" for word in re.findall(r"[a-z]+|\d+", question.lower())]
    return set(pairwise(words))


def likeness(pairs: set, other: set) -> float:
    """The share of the pairs of neighbouring words of two questions that both have, from 0 to 1 (Jaccard)."""
    return len(pairs & other) / max(len(pairs | other), 1)


def worded_like(questions: list[str], numbers: list[int]) -> list[bool]:
    """Which questions are worded like a problem of one of these templates?"""
    count: dict[int, int] = dict.fromkeys(numbers, 0)
    examples = []
    for problem in problems(numbers, SEEDS["likeness"]):
        if count[problem["template"]] < EXAMPLES_OF_A_TEMPLATE:
            count[problem["template"]] += 1
            examples.append(pairs_of_words(problem["question"]))
            if min(count.values()) == EXAMPLES_OF_A_TEMPLATE:
                break
    pairs = map(pairs_of_words, questions)
    return [any(likeness(each, example) >= LIKE for example in examples) for each in pairs]


def without(rows: list[dict], is_left_out: list[bool]) -> list[dict]:
    return [row for row, leave in zip(rows, is_left_out, strict=True) if not leave]


def gsm8k(split: str, data: str | None) -> list[dict]:
    """`question` and `answer` without the calculator's marks."""
    return [
        {"question": row["question"].strip(), "answer": CALCULATION.sub("", row["answer"]).strip()}
        for row in GSM8K.load(split, data)
    ]


def write(path: Path, rows: list[dict]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


def main():
    parser = CommandParser(__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/gsm8k/rows"), help="folder for the files")
    parser.add_argument("--data", help="folder with GSM8K's files (default: what DPARALLEL_DATA says, or the Hub)")
    parser.add_argument("--num_symbolic", type=int, default=60_000, help="training problems of GSM-Symbolic")
    parser.add_argument("--repeat_gsm8k", type=int, default=3, help="how often each training row of GSM8K comes")
    parser.add_argument("--num_test", type=int, default=1000, help="problems of each test of GSM-Symbolic")
    arguments = parser.parse_args()
    for name in ("num_symbolic", "repeat_gsm8k", "num_test"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)}: it must be at least 1")
    with plain_errors(ValueError, OSError, ImportError):
        seen, unseen = templates()
        train, test = gsm8k("train", arguments.data), gsm8k("test", arguments.data)
        train = without(train, worded_like([row["question"] for row in train], unseen))
        test = without(test, worded_like([row["question"] for row in test], [*seen, *unseen]))
        tested = {
            "seen": list(islice(problems(seen, SEEDS["seen"]), arguments.num_test)),
            "unseen": list(islice(problems(unseen, SEEDS["unseen"]), arguments.num_test)),
        }
    taken = {numbers_of(problem) for problem in tested["seen"]}
    new = (problem for problem in problems(seen, SEEDS["train"]) if numbers_of(problem) not in taken)
    symbolic = list(islice(new, arguments.num_symbolic))
    rows, prompts = [*train * arguments.repeat_gsm8k, *symbolic], [*train, *symbolic]
    for each in (rows, prompts):
        random.Random(0).shuffle(each)

    folder = arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    for name, problems_of_test in tested.items():
        write(folder / f"symbolic_{name}.jsonl", problems_of_test)
    write(folder / "gsm8k_rest.jsonl", test)
    write(folder / "prompts.jsonl", [{name: row[name] for name in ("question", "answer")} for row in prompts])
    chats = [
        {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }
        for row in rows
    ]
    write(folder / "train.jsonl", chats)
    print(
        f"In {folder}: the rows. Next, to train on them: accelerate launch examples/fine_tune.py --config "
        f"examples/gsm8k/fine_tune.yaml --dataset_name {folder / 'train.jsonl'}"
    )


if __name__ == "__main__":
    main()
