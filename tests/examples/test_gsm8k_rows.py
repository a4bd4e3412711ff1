"""The rows of the study on real weights: what is tested is not trained on."""

import importlib.util
import itertools
import json

import pytest

from dparallel.evaluation.command_line import find_task
from tests.scripts import EXAMPLES, call, load

rows = load("gsm8k/rows.py")


def generated(numbers, seed):
    """Problems of three templates, each of another question."""
    words = {
        0: "{n} apples cost {p} dollars each . What is paid ?",
        1: "A train goes {n} km in {p} hours . How fast ?",
    }
    words[2] = "Of {n} hens , {p} lay an egg a day . How many eggs are there after a week ?"
    for i in itertools.count():
        number = numbers[i % len(numbers)]
        question = words[number].format(n=1000 * seed + i, p=i + 2)
        yield {"question": question, "answer": f"It is {i}.\n#### {i}", "template": number}


GSM8K = {
    "train": [
        "Tom reads 3 pages of a book on each of 4 days. How many pages does he read?",
        "Of 60 hens, 20 lay an egg a day. How many eggs are there after 3 weeks?",  # worded like an unseen template
    ],
    "test": [
        "Ann walks 2 km to school and back, 5 days. How many km is that in all?",
        "A train goes 300 km in 3 hours. How fast is it?",  # worded like a seen template
    ],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for split, questions in GSM8K.items():
        lines = [json.dumps({"question": each, "answer": "3 x 4 = <<3*4=12>>12\n#### 12"}) for each in questions]
        (tmp_path / f"gsm8k_{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(rows, "templates", lambda: ([0, 1], [2]))
    monkeypatch.setattr(rows, "problems", generated)
    flags = f"--data {tmp_path} --output_dir {tmp_path / 'out'} --num_symbolic 20 --repeat_gsm8k 2 --num_test 5"
    monkeypatch.setattr("sys.argv", ["rows.py", *flags.split()])
    rows.main()
    return tmp_path / "out"


def numbers(question):
    return rows.numbers_of({"template": 0, "question": question})[1:]


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_what_is_tested_is_not_trained_on(folder):
    train, prompts = read(folder / "train.jsonl"), read(folder / "prompts.jsonl")
    trained = {row["prompt"][0]["content"] for row in train}
    assert len(train) == 22 and len(prompts) == 21 and trained == {row["question"] for row in prompts}
    tested = [row for name in ("seen", "unseen") for row in read(folder / f"symbolic_{name}.jsonl")]
    assert len(tested) == 10 and not trained & {row["question"] for row in tested}
    assert {row["template"] for row in read(folder / "symbolic_unseen.jsonl")} == {2}
    assert not any("hens" in question for question in trained)  # neither of the template nor worded like it
    assert [row["question"] for row in read(folder / "gsm8k_rest.jsonl")] == GSM8K["test"][:1]
    tests = {rows.numbers_of(row) for row in tested}
    assert not any((number, *tests_numbers) in tests for number in (0, 1) for tests_numbers in map(numbers, trained))
    row = next(row for row in train if "Tom" in row["prompt"][0]["content"])
    assert row["completion"] == [{"role": "assistant", "content": "3 x 4 = 12\n#### 12"}]


@pytest.mark.parametrize("name", ["GSM8K_REST", "SYMBOLIC_SEEN", "SYMBOLIC_UNSEEN"])
def test_tasks_read_the_files(folder, name):
    task = find_task(f"{EXAMPLES / 'gsm8k' / 'rows.py'}:{name}")
    question = task.questions(data=folder, limit=1)[0]
    row = json.loads(question["row"])
    assert question["prompt"] == [{"role": "user", "content": row["question"]}]
    assert task.is_right(row, row["answer"]) and not task.is_right(row, "It is 7777.")
    with pytest.raises(ValueError, match="there is no file"):
        task.questions(data=folder.parent)


def test_a_problem_that_is_tested_is_not_trained_on_with_other_names(tmp_path, monkeypatch):
    def few(templates, seed):
        for i in itertools.count():
            name = ["", "An", "Bo", "Ci", "Da"][seed] + "a" * i  # another one for each seed
            row = {"question": f"{name} has {i % 30} hens.", "answer": f"#### {i % 30}"}
            yield row | {"template": templates[i % len(templates)]}

    for split in ("train", "test"):
        (tmp_path / f"gsm8k_{split}.jsonl").write_text(json.dumps({"question": "Why?", "answer": "#### 1"}))
    monkeypatch.setattr(rows, "templates", lambda: ([0], [2]))
    monkeypatch.setattr(rows, "problems", few)
    words = f"--data {tmp_path} --output_dir {tmp_path / 'out'} --num_symbolic 20 --num_test 10"
    monkeypatch.setattr("sys.argv", ["rows.py", *words.split()])
    rows.main()
    tested, trained = (read(tmp_path / "out" / f"{name}.jsonl") for name in ("symbolic_seen", "prompts"))
    assert {row["answer"] for row in tested} == {f"#### {i}" for i in range(10)}
    assert {row["answer"] for row in trained if row["question"] != "Why?"} == {f"#### {i}" for i in range(10, 30)}


def test_likeness_is_the_share_of_pairs_that_both_have():
    one, other = (rows.pairs_of_words(text) for text in ("He has 12 red beads", "He has 3 blue beads, she 4"))
    assert rows.likeness(one, one) == 1 and rows.likeness(one, set()) == 0 == rows.likeness(set(), set())
    assert rows.likeness(one, other) == 2 / 8  # he has, has #; red and blue, and what follows, differ


@pytest.mark.parametrize("flag", ["num_symbolic", "repeat_gsm8k", "num_test"])
def test_wrong_numbers_are_refused(flag):
    result = call("gsm8k/rows.py", f"--{flag}", 0)
    assert result.returncode == 2 and f"--{flag} 0: it must be at least 1" in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="pip install reasoning-gym==0.1.25")
def test_the_templates_of_the_package():
    seen, unseen = rows.templates()
    assert (len(seen), len(unseen)) == (68, 17) and not set(seen) & set(unseen)
    some = list(itertools.islice(rows.problems(unseen, 5), 300))
    assert {problem["template"] for problem in some} == set(unseen)
    assert len({problem["question"] for problem in some}) == 300
    assert some == list(itertools.islice(rows.problems(unseen, 5), 300))
    assert not any("Do not include units" in problem["question"] for problem in some)
    assert all(rows.same_number(problem["answer"], problem["answer"].rpartition("#### ")[2]) for problem in some)
