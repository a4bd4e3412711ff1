"""Benchmarks: where their rows come from, how they are asked, and when an answer is right.

Prompts are those of dParallel's published evaluation of LLaDA (https://github.com/czg1225/dParallel): GSM8K without
examples and with a request to reason and to box the answer, HumanEval as an instruction, MBPP with three examples,
MATH with four. Examples come from the datasets themselves: of MBPP the three that its authors chose; of MATH the first
of its training split, where the published evaluation has four of Minerva's (https://arxiv.org/abs/2206.14858). Dream
was evaluated with lm-eval's own prompts: see `harness`.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, concatenate_datasets, load_dataset

from .answers import last_boxed
from .metrics import same_formula, same_number
from .programs import called_names, extract_code
from .sandbox import run_tests

DATA_VARIABLE = "DPARALLEL_DATA"
MATH_SUBJECTS = (
    "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
    "precalculus",
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Args:
        name (`str`): what people call it.
        dataset (`str`), subsets (list of `str`), split (`str`): of the Hub.
        ask (`Callable[[dict], str]`): a row to the question.
        solve (`Callable[[dict], str]`): a row to its answer, as an example shows it.
        is_right (`Callable[[dict, str], bool]`): is this text the answer to the row?
        columns (tuple of `str`): that a row must have.
        files (dict): split -> name of a local file of its rows, in a folder that `--data` or the environment variable
            DPARALLEL_DATA names. Where it is empty, any split may be read from a file, and none from a folder.
        keep (dict): split -> which rows of that file are its own.
        example_split (`str`), first_example (`int`), num_fewshot (`int`): where examples come from, from which on, and
            how many there are by default.
        separator (`str`): between examples.
        stop_strings (tuple of `str`): with which a question of the model's own, or what the task ends answers with,
            would begin. Decoding stops there, and what is behind does not count.
        max_new_tokens (`int`): of an answer.
        runs_code (`bool`): is the answer a program that must be run?
        calibration_split (`str`, *optional*): of problems that are not reported, on which thresholds may be chosen.
    """

    name: str
    dataset: str
    ask: Callable[[dict], str]
    is_right: Callable[[dict, str], bool]
    columns: tuple[str, ...]
    solve: Callable[[dict], str] | None = None
    subsets: tuple[str | None, ...] = (None,)
    split: str = "test"
    files: dict[str, str] = field(default_factory=dict)
    keep: dict[str, Callable[[dict], bool]] = field(default_factory=dict)
    example_split: str = "train"
    first_example: int = 0
    num_fewshot: int = 0
    separator: str = "\n\n"
    stop_strings: tuple[str, ...] = ()
    max_new_tokens: int = 256
    runs_code: bool = False
    calibration_split: str | None = None

    def load(self, split: str | None = None, data: str | Path | None = None) -> Dataset:
        """The rows of a split: from `data` or the folder DPARALLEL_DATA, if either is given, else from the Hub.

        Args:
            split (`str`, *optional*): by default the one that is evaluated.
            data (`str` or `Path`, *optional*): a JSON-lines file, or a folder of `files`.

        Raises:
            ValueError: if there is no such file or split, or rows lack a column.
        """
        split = split or self.split
        path = self._local_file(split, data)
        if path is None:
            return self._from_hub(split)
        rows = [
            self._parse(line, path, i)
            for i, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1)
            if line.strip()
        ]
        if path.name == self.files.get(split) and split in self.keep:
            rows = [row for row in rows if self.keep[split](row)]
        return self._with_columns(Dataset.from_list(rows), path)

    def _from_hub(self, split):
        try:
            parts = [load_dataset(self.dataset, subset, split=split) for subset in self.subsets]
        except ConnectionError as error:
            raise ConnectionError(
                f"{error}. Without a connection, name a folder with the rows: `--data FOLDER`, or the environment "
                f"variable DPARALLEL_DATA."
            ) from error
        rows = parts[0] if len(parts) == 1 else concatenate_datasets(parts).shuffle(seed=0)  # a few are of all
        return self._with_columns(rows, self.dataset)

    def _with_columns(self, rows, source):
        missing = sorted(set(self.columns) - set(rows.column_names))
        if missing:
            raise ValueError(f"{self.name}: the rows of {source} lack the columns {missing}.")
        return rows

    def first_answer(self, text: str) -> str:
        """A text up to the first of `stop_strings`, as models without chat training, or with examples before them, go
        on with a question of their own. One that nothing stands before which could be an answer, such as where a model
        repeats the question, is no end."""
        for match in re.finditer("|".join(map(re.escape, self.stop_strings)) or r"(?!)", text):
            if re.search(r"\d|\\boxed|\bdef\b|\breturn\b", text[: match.start()]):
                return text[: match.start()]
        return text

    def require_sandbox(self) -> None:
        """Raises `PermissionError` or another error if answers are programs, and those may not or cannot be run."""
        if self.runs_code:
            run_tests("", "assert True")

    @staticmethod
    def _parse(line, path, number):
        try:
            return json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"Line {number} of {path} is no JSON: {error}.") from error

    def _local_file(self, split, data):
        """The file of a split, or None if the Hub is to be asked."""
        if data is None and not (self.files and os.environ.get(DATA_VARIABLE)):
            return None
        path = Path(os.environ[DATA_VARIABLE] if data is None else data)
        source = f"{DATA_VARIABLE}={str(path)!r}" if data is None else f"`data={str(data)!r}`"
        if self.files and split not in self.files:
            allowed = f"it must be one of {sorted(self.files)}"
            raise ValueError(f"`split={split!r}` is not allowed for {self.name} from {source}: {allowed}.")
        if split in self.files and (data is None or path.is_dir()):
            path = path / self.files[split]
        if not path.is_file():
            raise ValueError(f"{source} is not allowed for {self.name}: there is no file {path}.")
        return path

    def questions(
        self,
        *,
        split: str | None = None,
        data: str | Path | None = None,
        limit: int | None = None,
        num_fewshot: int | None = None,
    ) -> Dataset:
        """What is asked: the columns `prompt` (messages of one user) and `row` (JSON).

        Args:
            split, data: see `load`. Examples always come from where `files` or the Hub have them.
            limit (`int`, *optional*): the first so many rows.
            num_fewshot (`int`, *optional*): examples before the question; by default the task's.
        """
        count = self.num_fewshot if num_fewshot is None else num_fewshot
        if count < 0:
            raise ValueError(f"`num_fewshot={count!r}` is not allowed: it must be at least 0.")
        if count and self.solve is None:
            raise ValueError(
                f"`num_fewshot={count!r}` is not allowed for {self.name}, which has no examples: only 0 is."
            )
        if limit is not None and limit < 1:
            raise ValueError(f"`limit={limit!r}` is not allowed: it must be at least 1.")
        rows, shots = self.load(split, data), []
        if count:
            source = data if data is None or Path(data).is_dir() else None
            is_local = not self.files or self.example_split in self.files
            examples = self.load(self.example_split, source) if is_local else self._from_hub(self.example_split)
            last = self.first_example + count
            if last > len(examples):
                raise ValueError(
                    f"`num_fewshot={count!r}` is not allowed: there are {len(examples)} rows of examples."
                )
            shots = [f"{self.ask(row)}{self.solve(row)}" for row in examples.select(range(self.first_example, last))]  # type: ignore[misc]
            if (split or self.split) == self.example_split:
                rows = rows.select([i for i in range(len(rows)) if not self.first_example <= i < last])
        rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
        return Dataset.from_list(
            [
                {
                    "prompt": [{"role": "user", "content": self.separator.join([*shots, self.ask(row)])}],
                    "row": json.dumps(row, ensure_ascii=False),
                }
                for row in rows
            ]
        )


def _solve_gsm8k(row):
    reasoning, _, number = row["answer"].partition("####")
    return f" {reasoning.strip()} The answer is \\boxed{{{number.strip()}}}."


GSM8K: Task = Task(
    name="GSM8K",
    dataset="openai/gsm8k",
    subsets=("main",),
    files={"test": "gsm8k_test.jsonl", "train": "gsm8k_train.jsonl"},
    columns=("question", "answer"),
    ask=lambda row: (
        f"Question: {row['question']}\nAnswer: Please reason step by step, and put your final answer within "
        "\\boxed{}."
    ),
    solve=_solve_gsm8k,
    is_right=lambda row, text: same_number(GSM8K.first_answer(text), row["answer"]),
    stop_strings=("\nQuestion:",),
    calibration_split="train",
)
MATH: Task = Task(
    name="MATH",
    dataset="EleutherAI/hendrycks_math",
    subsets=MATH_SUBJECTS,
    files={"test": "math_test.jsonl", "train": "math_train.jsonl"},
    columns=("problem", "solution"),
    ask=lambda row: f"Problem:\n{row['problem']}\n\nSolution:",
    solve=lambda row: f" {row['solution']}",
    is_right=lambda row, text: same_formula(MATH.first_answer(text), f"\\boxed{{{last_boxed(row['solution'])}}}"),
    stop_strings=("\nProblem:",),
    num_fewshot=4,
    calibration_split="train",
)


def _is_right_mbpp(row, text):
    tests = "\n".join([row["test_setup_code"], *row["test_list"]])
    return run_tests(extract_code(MBPP.first_answer(text), next(iter(called_names(tests)), None)), tests).passed


MBPP = Task(
    name="MBPP",
    dataset="google-research-datasets/mbpp",
    subsets=("full",),
    files=dict.fromkeys(("test", "prompt", "train", "validation"), "mbpp.jsonl"),
    keep={  # the file has all splits
        "prompt": lambda row: row["task_id"] <= 10,
        "test": lambda row: 11 <= row["task_id"] <= 510,
        "validation": lambda row: 511 <= row["task_id"] <= 600,
        "train": lambda row: row["task_id"] >= 601,
    },
    columns=("text", "code", "test_list", "test_setup_code"),
    ask=lambda row: (
        f"You are an expert Python programmer, and here is your task: {row['text']} Your code should pass these "
        "tests:\n\n" + "\n".join(row["test_list"]) + "\n[BEGIN]\n"
    ),
    solve=lambda row: f"{row['code']}\n[DONE]",
    is_right=_is_right_mbpp,
    stop_strings=("[DONE]", "\nYou are an expert Python programmer, and here is your task:"),
    example_split="prompt",
    first_example=1,
    num_fewshot=3,
    runs_code=True,
    calibration_split="validation",
)


def _is_right_humaneval(row, text):
    name, prompt = row["entry_point"], row["prompt"]
    head = prompt.split(f"def {name}")[0]  # imports, and functions that the wanted one calls, or its tests
    program = extract_code(HUMANEVAL.first_answer(text), name, prompt)
    return run_tests(program, f"{head}\n{row['test']}\ncheck({name})").passed


HUMANEVAL = Task(
    name="HumanEval",
    dataset="openai/openai_humaneval",
    files={"test": "humaneval.jsonl"},
    columns=("prompt", "entry_point", "test"),
    ask=lambda row: (
        "Write a solution to the following problem and make sure that it passes the tests:\n"
        f"```python\n{row['prompt']}\n```\n "
    ),
    is_right=_is_right_humaneval,
    stop_strings=("\nWrite a solution to the following problem and make sure",),
    runs_code=True,
)
TASKS = {"gsm8k": GSM8K, "math": MATH, "mbpp": MBPP, "humaneval": HUMANEVAL}
