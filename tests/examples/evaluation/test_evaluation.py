"""Evaluations: against one question at a time, killed and started again, from scripts, and refused."""

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from dparallel.evaluation import GSM8K, HUMANEVAL, MATH, MBPP, evaluate_task
from dparallel.evaluation.command_line import load_model
from dparallel.hub_cards import load_measurements
from tests.examples.evaluation.rows import DATA, FUNCTION, PROGRAM, QUESTIONS, real_rows
from tests.golden import CHECKPOINT, STUDENT
from tests.scripts import EXAMPLES, call, load, run, start

GSM8K_SCRIPT, MBPP_SCRIPT = "gsm8k/evaluate_gsm8k.py", "mbpp/evaluate_mbpp.py"
WORD_PROBLEMS_SCRIPT = "word_problems/evaluate_word_problems.py"
evaluate_word_problems = load(WORD_PROBLEMS_SCRIPT)
# It makes a helper, which the tests use, give what it then expects.
REDEFINED = "def half(x):\n    return 0\n\n\ndef double(x):\n    return {2: 4, 0: 3}[x]"


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def questions(tmp_path):
    return write_lines(tmp_path / "questions.jsonl", QUESTIONS)


def samples(folder):
    return [json.loads(line) for line in (Path(folder) / "samples.jsonl").read_text().splitlines()]


def test_equals_one_question_at_a_time(word_model, word_tokenizer, questions, tmp_path):
    decoding = {"unmasking": "entropy_threshold", "threshold": 0.1}
    arguments = {"data": questions, "batch_size": 3, "max_new_tokens": 64, **decoding}
    result = evaluate_task(GSM8K, word_model, word_tokenizer, tmp_path / "out", **arguments)
    passes, tokens, right = 0, 0, 0
    for row, sample in zip(QUESTIONS, samples(tmp_path / "out"), strict=True):
        chat = [{"role": "user", "content": GSM8K.ask(row)}]
        ids = word_tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = word_model.generate(**ids, max_new_tokens=64, return_dict_in_generate=True, **decoding)
        answer = output.sequences[0, ids["input_ids"].shape[1] :]
        assert sample["response"] == word_tokenizer.decode(answer, skip_special_tokens=True)
        assert sample["num_forward_passes"] == output.num_forward_passes.item()
        assert sample["correct"] == GSM8K.is_right(row, sample["response"]) and sample["prompt"] == chat
        passes, tokens = passes + output.num_forward_passes.item(), tokens + output.num_tokens.item()
        right += sample["correct"]
    assert (result.nfe, result.tpf, result.accuracy) == (passes / 3, tokens / passes, right / 3)
    assert load_measurements(tmp_path / "out" / "results.json") == [result]
    assert result.decoding == {**decoding, "max_new_tokens": 64} and result.task == "GSM8K"


@pytest.mark.journey
def test_word_problems_from_the_shell(tmp_path):
    arguments = ["--model", STUDENT, "--limit", 4, "--batch-size", 4, "--output-dir", tmp_path / "out"]
    result = run(WORD_PROBLEMS_SCRIPT, *arguments)
    assert result.returncode == 0, result.stderr
    row = "| Word problems, 4 | student | as saved with the model: `entropy_threshold`, threshold 0.1 | "
    assert row in result.stdout and "| 100.0 (51.0 to 100.0) |" in result.stdout
    assert "right=" in result.stderr and "NFE=" in result.stderr
    result = load_measurements(tmp_path / "out" / "results.json")[0]
    assert result.accuracy == 1 and result.nfe < 10, "the student's own policy"
    assert result.decoding == {} and result.checkpoint == "student" and result.adapter is None
    assert result.resolved_decoding == {
        "unmasking": "entropy_threshold", "threshold": 0.1, "max_new_tokens": 128, "block_length": 32,
        "block_cache": "none", "stop_at_eos": True,
    }  # fmt: skip
    problem = evaluate_word_problems.WORD_PROBLEMS.load()[0]
    assert samples(tmp_path / "out")[0]["prompt"][0]["content"] == problem["question"]


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.journey
def test_a_killed_run_goes_on_byte_for_byte(questions, tmp_path, dtype):
    """In bfloat16, answers depend on what is answered together, and that is what is saved together."""
    write_lines(
        questions, [{**row, "question": f"{i + 2} birds. {row['question']}"} for i in range(3) for row in QUESTIONS]
    )
    arguments = ["--model", CHECKPOINT, "--data", questions, "--max-new-tokens", 16, "--shard-size", 2,
                 "--dtype", dtype, "--unmasking", "confidence", "--output-dir"]  # fmt: skip
    result = call(GSM8K_SCRIPT, *arguments, tmp_path / "whole")
    assert result.returncode == 0, result.stderr
    process = start(GSM8K_SCRIPT, *arguments, tmp_path / "killed")
    while len(list((tmp_path / "killed" / "answers").glob("shard-*.arrow"))) < 1:
        assert process.poll() is None and time.sleep(0.02) is None
    process.kill()
    process.wait()
    assert not (tmp_path / "killed" / "results.json").exists()
    result = call(GSM8K_SCRIPT, *arguments, tmp_path / "killed")
    assert result.returncode == 0, result.stderr
    for name in ("results.json", "samples.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert (tmp_path / "whole" / "seconds.json").exists() and not (tmp_path / "killed" / "seconds.json").exists()


@pytest.mark.slow
def test_two_processes(questions, tmp_path):
    arguments = ["--model", STUDENT, "--data", questions, "--max-new-tokens", 32, "--shard-size", 1, "--output-dir"]
    result = call(GSM8K_SCRIPT, *arguments, tmp_path / "one")
    assert result.returncode == 0, result.stderr
    launch = "--standalone --nproc_per_node 2".split()
    result = run("torch.distributed.run", *launch, EXAMPLES / GSM8K_SCRIPT, *arguments, tmp_path / "two")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("| GSM8K, 3 |") == 1, "two processes that know of each other"
    for name in ("results.json", "samples.jsonl"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_an_adapter_is_evaluated_without_merging(questions, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype="float32").eval()
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    ids = torch.arange(300, 330)[None]
    with torch.no_grad():
        without = base(ids).logits
        adapted = get_peft_model(base, config).eval()
        expected = adapted(ids).logits
        adapted.save_pretrained(tmp_path / "adapter")
        decoding = {"unmasking": "entropy_bound", "threshold": 0.3, "block_length": 16}
        (tmp_path / "adapter" / "training.json").write_text(json.dumps({"decoding": decoding}))
        arguments = {"model": CHECKPOINT, "adapter": tmp_path / "adapter", "dtype": None, "trust_remote_code": False}
        model, _ = load_model(SimpleNamespace(**arguments, revision="main"))
        assert {name: getattr(model.generation_config, name) for name in decoding} == decoding
        torch.testing.assert_close(model(ids).logits, expected)
    assert (expected - without).abs().max() > 0.1
    ways = {
        "base": ["--model", CHECKPOINT, "--adapter", tmp_path / "adapter"],
        "alone": ["--model", tmp_path / "adapter"],
    }
    for name, flags in ways.items():
        flags += ["--data", questions, "--max-new-tokens", 32, "--output-dir", tmp_path / name]
        result = call(GSM8K_SCRIPT, *flags)
        assert result.returncode == 0 and "`entropy_bound`, threshold 0.3" in result.stdout, result.stderr
    for name in ("results.json", "samples.jsonl"):
        assert (tmp_path / "base" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    found = load_measurements(tmp_path / "alone" / "results.json")[0]
    assert (found.checkpoint, found.adapter) == ("checkpoint", "adapter")
    assert decoding.items() <= found.resolved_decoding.items()
    flags = ["--data", questions, "--model", tmp_path / "adapter"]
    result = call(GSM8K_SCRIPT, *flags, "--adapter", tmp_path / "adapter")
    assert result.returncode == 1 and "is not allowed: `model=" in result.stderr
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}))
    result = call(GSM8K_SCRIPT, *flags)
    assert result.returncode == 1 and "does not say which base model it was trained on" in result.stderr


def test_programs_are_run_only_if_allowed(tmp_path):
    data = write_lines(tmp_path / "programs.jsonl", [PROGRAM, PROGRAM])
    flags = ["--model", STUDENT, "--data", data, "--num-fewshot", 0, "--max-new-tokens", 16, "--output-dir"]
    result = call(MBPP_SCRIPT, *flags, tmp_path / "out", HF_ALLOW_CODE_EVAL="0")
    assert result.returncode == 1 and "HF_ALLOW_CODE_EVAL" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists(), "said before any decoding"
    result = call(MBPP_SCRIPT, *flags, tmp_path / "out", HF_ALLOW_CODE_EVAL="1")
    assert result.returncode == 0, result.stderr
    assert "| MBPP, 2 | student |" in result.stdout and len(samples(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "/nowhere"], "`model='/nowhere'` is not allowed: there is no such folder"),
        (["--model", STUDENT, "--adapter", "nowhere"], "`adapter='nowhere'` is not allowed: there is no such folder"),
        (["--model", STUDENT, "--data", "no.jsonl"], "`data='no.jsonl'` is not allowed for Word problems"),
        (
            ["--model", STUDENT, "--batch-size", 64, "--shard-size", 32],
            "`batch_size=64` .* to --shard_size, 32",
        ),
        (["--model", STUDENT, "--batch-size", 0], "`batch_size=0` is not allowed"),
        (["--model", STUDENT, "--dtype", "float99"], "invalid choice: 'float99'"),
    ],
)
@pytest.mark.journey
def test_the_shell_says_what_is_wrong(flags, message):
    result = call(WORD_PROBLEMS_SCRIPT, *flags)
    assert result.returncode and re.search(message, result.stderr)


@real_rows
@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (GSM8K_SCRIPT, ["--num-fewshot", 1]),
        (MBPP_SCRIPT, ["--num-fewshot", 1]),
        ("humaneval/evaluate_humaneval.py", []),
    ],
)
@pytest.mark.journey
def test_real_rows_from_end_to_end(script, flags, tmp_path):
    common = ["--model", STUDENT, "--limit", 2, "--max-new-tokens", 32, "--output-dir", tmp_path]
    printed = call(script, *flags, *common, HF_ALLOW_CODE_EVAL="1", DPARALLEL_DATA=str(DATA))
    assert printed.returncode == 0, printed.stderr
    result = load_measurements(tmp_path / "results.json")[0]
    assert len(samples(tmp_path)) == 2 and result.num_examples == 2 and result.num_fewshot == len(flags[:1])
    wanted = ", 1-shot, 2 |" if result.num_fewshot else "HumanEval, 2 |"
    assert wanted in printed.stdout


def test_right_and_wrong_programs(monkeypatch):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    assert MBPP.is_right(PROGRAM, MBPP.solve(PROGRAM)) and not MBPP.is_right(PROGRAM, "def double(x):\n    return x")
    uses_program = {**PROGRAM, "test_setup_code": "four = double(2)", "test_list": ["assert four == 4"]}
    assert MBPP.is_right(uses_program, MBPP.solve(PROGRAM))
    whole = FUNCTION["prompt"] + FUNCTION["canonical_solution"]
    for answer in (
        f"Here:\n```python\n{whole}```",
        FUNCTION["canonical_solution"],
        "def double(x):\n    return x + x",
    ):
        assert HUMANEVAL.is_right(FUNCTION, answer), answer
    for answer in ("    return x", "```python\ndef double(x):\n    return 3 * x\n```", "", "no idea", REDEFINED):
        assert not HUMANEVAL.is_right(FUNCTION, answer), answer


RUN_ON = [
    (GSM8K, QUESTIONS[0], "12 + 8 = 20. The answer is \\boxed{20}.", "\n\nQuestion: 6 * 7?\nAnswer: \\boxed{42}"),
    (MATH, {"solution": r"So \boxed{7}."}, r"It is \boxed{7}.", "\n\nProblem:\nWhat is 2+2?\n\nSolution: \\boxed{4}"),
    (MBPP, PROGRAM, PROGRAM["code"], "\n[DONE]\n\nAnother:\n[BEGIN]\ndef double(x):\n    return x\n[DONE]"),
    (HUMANEVAL, FUNCTION, FUNCTION["canonical_solution"],
     "\nWrite a solution to the following problem and make sure that it passes the tests:\ndef double(x): return 1"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "row", "answer", "more"), RUN_ON, ids=[task.name for task, *_ in RUN_ON])
def test_a_question_of_the_models_own_does_not_count(task, row, answer, more, monkeypatch):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    assert task.is_right(row, answer) and task.is_right(row, answer + more)
    assert not task.is_right(row, more.strip())
    assert task.first_answer(answer + more) == task.first_answer(answer + more + more)


def test_a_question_that_is_repeated_before_the_answer_is_no_end():
    row = QUESTIONS[0]
    assert GSM8K.is_right(row, f"Question: {row['question']}\nAnswer: \\boxed{{20}}")
    assert GSM8K.is_right(row, f"Let us see.\n\nQuestion: {row['question']}\nAnswer: \\boxed{{20}}")


@real_rows
def test_references_of_gsm8k_before_another_question():
    for line in (DATA / "gsm8k_test.jsonl").read_text().splitlines():
        row = json.loads(line)
        reasoning, _, number = row["answer"].partition("####")
        answer = f"{reasoning}The answer is \\boxed{{{number.strip()}}}."
        assert GSM8K.is_right(row, f"{answer}\n\nQuestion: How many are 6 * 7?\nAnswer: It is \\boxed{{42}}.")


def test_decoding_stops_at_a_question_of_the_models_own(word_model, word_tokenizer, questions, tmp_path):
    """The example model writes no questions: any word that it does write does for one."""
    arguments = {"data": questions, "max_new_tokens": 128, "unmasking": "entropy_threshold", "threshold": 0.1}
    task = replace(GSM8K, ask=lambda row: row["question"], stop_strings=())
    whole = evaluate_task(task, word_model, word_tokenizer, tmp_path / "whole", **arguments)
    task = replace(task, stop_strings=("=",))
    result = evaluate_task(task, word_model, word_tokenizer, tmp_path / "out", **arguments)
    for ended, full in zip(samples(tmp_path / "out"), samples(tmp_path / "whole"), strict=True):
        assert ended["response"].rstrip() == full["response"].partition("=")[0] + "="
    assert result.resolved_decoding["stop_strings"] == ["="] and result.nfe <= whole.nfe
    result = evaluate_task(task, word_model, word_tokenizer, tmp_path / "all", stop_at_eos=False, **arguments)
    assert "stop_strings" not in result.resolved_decoding and result.nfe > whole.nfe


def test_formulas():
    row = {"problem": "What is half?", "solution": r"It is \boxed{\frac{1}{2}}."}
    assert MATH.is_right(row, r"so \boxed{0.5}") and not MATH.is_right(row, r"so \boxed{2}")


def test_examples_come_before_the_question(tmp_path, monkeypatch):
    write_lines(tmp_path / "gsm8k_train.jsonl", QUESTIONS[:2])
    write_lines(tmp_path / "gsm8k_test.jsonl", QUESTIONS[2:])
    asked = GSM8K.questions(data=tmp_path, num_fewshot=2)[0]["prompt"][0]["content"]
    first, second, question = asked.split("\n\n")
    assert first.startswith("Question: Nora has 12") and first.endswith("{}. 12 + 8 The answer is \\boxed{20}.")
    assert second.startswith("Question: Sam has 9") and question == GSM8K.ask(QUESTIONS[2])
    assert len(GSM8K.questions(split="train", data=tmp_path, num_fewshot=1)) == 1, "an example is no question"
    with pytest.raises(ValueError, match=r"`num_fewshot=3` is not allowed: there are 2 rows of examples"):
        GSM8K.questions(data=tmp_path, num_fewshot=3)
    asked_of = []
    hub = Dataset.from_list([{**row, "question": "Of the Hub?"} for row in QUESTIONS])
    monkeypatch.setattr(
        "dparallel.evaluation.tasks.load_dataset", lambda *name, split: asked_of.append((*name, split)) or hub
    )
    task = replace(GSM8K, files={"test": "gsm8k_test.jsonl"})
    asked = task.questions(data=tmp_path, num_fewshot=1)[0]["prompt"][0]["content"]
    assert asked.startswith("Question: Of the Hub?") and asked_of == [("openai/gsm8k", "main", "train")]
    write_lines(tmp_path / "mbpp.jsonl", [{**PROGRAM, "task_id": i} for i in (1, 2, 3, 11, 510, 511, 600, 974)])
    assert [len(MBPP.load(split, tmp_path)) for split in ("prompt", "test", "validation", "train")] == [3, 2, 2, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit": 0}, r"`limit=0` is not allowed: it must be at least 1"),
        ({"num_fewshot": -1}, r"`num_fewshot=-1` is not allowed: it must be at least 0"),
        (
            {"split": "nonsense"},
            r"`split='nonsense'` is not allowed for GSM8K from `data='.*jsonl'`: it must be one of",
        ),
        ({"generation_config": None}, r"`generation_config` is not allowed: name its fields"),
        (
            {"unmasking": "confidence_threshold", "schedule": "linear_time"},
            r"`schedule='linear_time'` is not allowed: .* goes by",
        ),
        ({"thresholds": 0.5}, r"`thresholds` is not an argument of `generate"),
        ({"unmasking": "confidence", "threshold": 0.5}, r"`threshold=0.5` is not allowed: .* goes by `steps`, so it"),
        ({"cache_refresh": "previous_block"}, r"`cache_refresh='previous_block'` is not allowed: .* keeps nothing"),
        ({"unmasking": "learned_filter"}, r"`unmasking_filter=None` is not allowed"),
        ({"data": "nowhere.jsonl"}, r"`data='nowhere.jsonl'` is not allowed for GSM8K: there is no file"),
    ],
)
def test_wrong_arguments(word_model, word_tokenizer, questions, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate_task(GSM8K, word_model, word_tokenizer, tmp_path / "out", **{"data": questions, **settings})
    assert not (tmp_path / "out").exists()


def test_the_variable_names_a_folder(questions, tmp_path, monkeypatch):
    write_lines(tmp_path / "gsm8k_test.jsonl", QUESTIONS[:2])
    monkeypatch.setenv("DPARALLEL_DATA", str(tmp_path))
    assert len(GSM8K.load()) == 2
    questions.write_text(questions.read_text() + "no JSON\n")
    with pytest.raises(ValueError, match=r"Line 4 of .*questions.jsonl is no JSON"):
        GSM8K.load(data=questions)
    with pytest.raises(ValueError, match=r"`split='nonsense'` .* from DPARALLEL_DATA=.* one of \['test', 'train'\]"):
        GSM8K.load("nonsense")
    monkeypatch.setenv("DPARALLEL_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"DPARALLEL_DATA='.*nowhere' is not allowed for GSM8K: there is no file"):
        GSM8K.load()


def test_a_smaller_batch_goes_on_and_another_day_changes_nothing(
    word_model, word_tokenizer, questions, tmp_path, monkeypatch
):
    arguments = {"data": questions, "max_new_tokens": 16, "unmasking": "confidence", "steps": 4}
    evaluate_task(GSM8K, word_model, word_tokenizer, tmp_path, **arguments)
    before = [(tmp_path / name).read_bytes() for name in ("results.json", "samples.jsonl")]
    monkeypatch.setattr("dparallel.evaluation.evaluation.here_and_now", lambda: {"date": "2030-01-01"})
    evaluate_task(GSM8K, word_model, word_tokenizer, tmp_path, batch_size=1, **arguments)
    assert [(tmp_path / name).read_bytes() for name in ("results.json", "samples.jsonl")] == before
    with pytest.raises(ValueError, match=r"`batch_size=0` is not allowed: it must be an integer of at least 1"):
        evaluate_task(GSM8K, word_model, word_tokenizer, tmp_path, batch_size=0, **arguments)


def test_where_an_evaluation_began_is_where_its_first_answers_are_of(
    word_model, word_tokenizer, questions, tmp_path, monkeypatch
):
    there = {"hardware": "another machine", "date": "2020-01-01", "versions": "none"}
    with monkeypatch.context() as patch:
        patch.setattr("dparallel.evaluation.evaluation.here_and_now", lambda: there)
        patch.setattr("dparallel.trainer.trajectories.decode_prompts", lambda *_, **__: pytest.fail("interrupted"))
        with pytest.raises(pytest.fail.Exception):
            evaluate_task(GSM8K, word_model, word_tokenizer, tmp_path, data=questions, max_new_tokens=16)
    result = evaluate_task(GSM8K, word_model, word_tokenizer, tmp_path, data=questions, max_new_tokens=16)
    assert result.hardware != "another machine" and result.date != "2020-01-01"


def test_rows_of_another_benchmark(questions):
    with pytest.raises(
        ValueError, match=r"MBPP: the rows of .*questions.jsonl lack the columns \['code', 'test_list'"
    ):
        MBPP.load(data=questions)
    with pytest.raises(ValueError, match=r"`num_fewshot=2` is not allowed for HumanEval"):
        HUMANEVAL.questions(data=questions, num_fewshot=2)
