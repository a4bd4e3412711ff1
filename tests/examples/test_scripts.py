"""The example scripts as a user runs them."""

import argparse
import ast
import json
import math
import os
import random
import shlex
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import PartialState
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

from dparallel.evaluation.students import nfe_at, spread
from dparallel.hub_cards import load_measurements, push_dataset
from dparallel.hub_cards.command_line import CommandParser
from dparallel.modeling import DiffusionGenerationConfig, LLaDAModelLM
from dparallel.trainer import CertaintyForcingConfig, MaskedDiffusionConfig
from tests.families import FAMILIES
from tests.golden import CHECKPOINT, STUDENT
from tests.scripts import EXAMPLES, call, check_arguments, load, parser_of, run, split_command, start

quickstart, distill, judges = load("quickstart.py"), load("distill.py"), load("judges.py")
fine_tune = load("fine_tune.py")
distillation, solving = load("word_problems/distillation.py"), load("word_problems/solving.py")
TEACHER = {"unmasking": "entropy_threshold", "threshold": 0.1, "max_new_tokens": 64}


@pytest.mark.slow
def test_quickstart(tmp_path):
    result = run("quickstart.py", "--problems", 1, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Question: " in result.stdout and " ·" in result.stdout and "59 tokens in" in result.stdout
    rows = [line for line in result.stdout.splitlines() if "`" in line and line.startswith("|")]
    assert len(rows) == 8 and rows[0].startswith("| teacher | `confidence`, steps 128 | 64.0 |")
    assert rows[-1].startswith("| student | `entropy_threshold`, threshold 0.1 | 6.0 |")


@pytest.mark.journey
def test_quickstart_takes_another_model(tmp_path):
    result = call("quickstart.py", "--problems", 1, "--model", STUDENT, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = [line for line in result.stdout.splitlines() if line.startswith("| model | `")]
    assert len(rows) == 8 and "`entropy_threshold`, threshold 0.1" in rows[-1], "its own policy comes last"


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        ({}, None),
        ({"unmasking": "entropy_bound"}, {"unmasking": "entropy_bound", "threshold": 0.1}),
        ({"unmasking": "entropy_bound", "threshold": 0.3}, {"unmasking": "entropy_bound", "threshold": 0.3}),
        ({"unmasking": "margin"}, {"unmasking": "margin", "steps": 128}),
    ],
)
def test_quickstart_finds_the_policy_of_a_checkpoint(saved, expected):
    model = FAMILIES["llada"].make()
    model.generation_config = DiffusionGenerationConfig(**saved)
    assert quickstart.own_decoding(model) == expected


@pytest.mark.parametrize("count", [0, 5001])
def test_quickstart_refuses_wrong_numbers(count, tmp_path):
    result = call("quickstart.py", "--problems", count, cwd=tmp_path)
    assert result.returncode == 2 and f"--problems {count}: it must be from 1 to 5000" in result.stderr


@pytest.mark.journey
@pytest.mark.parametrize("block_causal", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_script_makes_a_checkpoint_that_loads(tmp_path, block_causal):
    flags = "--num_train_problems 64 --num_validation_problems 2 --max_steps 2 --per_device_train_batch_size 4".split()
    flags += "--dataloader_num_workers 0 --logging_steps 1 --warmup_steps 1 --use_cpu true --output_dir out".split()
    result = call("word_problems/train.py", *flags, "--block_causal", block_causal, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.block_causal_length == (32 if block_causal else None)
    assert "validation accuracy at one token a step: 0.000" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("In out: the model. Next, to measure it")
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 12e6
    names = {"modeling_llada.py", "generation_config.json", "tokenizer.json", "chat_template.jinja"}
    assert names <= {path.name for path in (tmp_path / "out").iterdir()}


def test_interval_is_wilsons():
    result = solving.Result("name", {}, [True] * 93 + [False] * 7, 1.0, 1.0, 1.0)
    low, high = result.interval
    for p in (low, high):  # the ends are where the normal test just holds
        assert abs(0.93 - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / 100))
    assert low < result.accuracy < high


COMMANDS = [
    *(
        str(path.relative_to(EXAMPLES))
        for path in sorted(EXAMPLES.rglob("*.py"))
        if "__main__" in path.read_text(encoding="utf-8") and path.parent.name != "evaluation"
    ),
    *(f"dparallel.evaluation.{name}" for name in ("sweep", "calibrate", "plot", "harness")),
    *(f"dparallel.hub_cards.{name}" for name in ("push_model", "push_dataset")),
]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_whole(name):
    """It says what the command does and what each option is, with its default, and ends in an example that is
    right."""
    folder = EXAMPLES.parent / "hub_cards" if "hub_cards" in name else EXAMPLES / "evaluation"
    path = EXAMPLES / name if name.endswith(".py") else folder / f"{name.rpartition('.')[2]}.py"
    parser = parser_of(name)
    first, _, rest = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).partition("\n\n")
    assert parser.description == first and parser.epilog == rest
    formatter = parser._get_formatter()
    for action in parser._actions:
        if action.help is not argparse.SUPPRESS:
            assert action.help and action.help.strip(), action.option_strings
            assert "(default: " in formatter._expand_help(action) or (
                action.nargs == 0 or action.required or not action.option_strings
            ), action.option_strings
    if isinstance(parser, CommandParser):
        assert "(default: None)" not in parser.format_help()
    examples = parser.format_help().replace("\\\n", "").splitlines()
    assert examples[-1].startswith("    ") and split_command(shlex.split(examples[-1]))[0] == name
    for line in examples:
        command = split_command(shlex.split(line)) if line.startswith(("    python", "    accelerate")) else None
        if command is not None:
            check_arguments(*command)


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("quickstart.py", ["--model", "nope"], "ValueError: `model='nope'` is not allowed: there is no such folder"),
        ("visualize.py", ["--model", "nope"], "ValueError: `model='nope'` is not allowed: there is no such folder"),
        ("distill.py", ["--config", "nope.yaml"], "FileNotFoundError: "),
        ("distill.py", ["--config", "broken.yaml"], "ScannerError: "),
        ("generate_trajectories.py", ["--config", "nope.yaml"], "FileNotFoundError: "),
        (
            "distill.py", ["--dataset_name", "a", "--output_dir", "b", "--teacher_generation_kwargs", "{1}"],
            "ValueError: `teacher_generation_kwargs='{1}'` is not allowed: it must be JSON",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_a_line(name, flags, message, tmp_path):
    (tmp_path / "broken.yaml").write_text("a: [\n\tb")
    result = call(name, *flags, cwd=tmp_path)
    assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr


# --- distillation ----------------------------------------------------------------------------------------------------

PROMPTS = [
    {"question": f"Sam has {i} {what}. Sam buys {i + 2} more. How many {what} does Sam have now?", "answer": 2 * i + 2}
    for i, what in enumerate("books beads coins shells nuts pens stones stamps".split(), start=3)
]
DISTILL = f"""--model_name_or_path {CHECKPOINT} --dtype float32 --dataset_name prompts.jsonl --prompt_column question
--judge {EXAMPLES / "judges.py"}:final_number --shard_size 2 --output_dir out --use_cpu true --report_to none
--per_device_train_batch_size 2 --max_length 128 --save_strategy steps --save_steps 1 --learning_rate 1e-3""".split()
DISTILL += ["--teacher_generation_kwargs", json.dumps(TEACHER), "--teacher_batch_size", "2"]


@pytest.fixture
def prompts_file(tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))


@pytest.mark.parametrize("use_peft", [True, False])
@pytest.mark.journey
def test_distill_makes_a_model_from_prompts(tmp_path, prompts_file, reader, word_tokenizer, use_peft):
    reader.save_pretrained(tmp_path / "teacher")
    word_tokenizer.save_pretrained(tmp_path / "teacher")
    flags = [tmp_path / "teacher" if flag == str(CHECKPOINT) else flag for flag in DISTILL]
    if type(reader) is not LLaDAModelLM:  # its answers are no use, but they are answers
        flags[flags.index("--judge") + 1] = tmp_path / "yes.py:yes"
        (tmp_path / "yes.py").write_text("def yes(row):\n    return True\n")
    flags += ["--max_steps", 2, "--threshold", 0.3, "--eval_size", 2, "--eval_strategy", "steps"]
    flags += ["--eval_steps", 2, "--eval_decoding_samples", 2, "--eval_max_new_tokens", 64]
    result = call("distill.py", *flags, *(["--use_peft"] if use_peft else []), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "answers are right" in result.stdout and "eval_decoding_accuracy" in result.stdout
    assert result.stdout.splitlines()[-1].startswith(
        "In out/merged: the distilled model. Next, to evaluate it on GSM8K: "
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged", trust_remote_code=True)
    assert (model.generation_config.unmasking, model.generation_config.threshold) == ("entropy_threshold", 0.3)
    assert (tmp_path / "out" / "merged" / "tokenizer.json").exists()
    assert (tmp_path / "out" / "adapter_model.safetensors").exists() == use_peft
    push_dataset(tmp_path / "out", "user/trajectories", dry_run=tmp_path / "dry")
    pushed = distillation.Dataset.from_parquet(str(next((tmp_path / "dry" / "data").iterdir())))
    assert {"prompt", "response", "correct", "settings"} <= set(pushed.column_names) and len(pushed) == len(PROMPTS)
    if use_peft:
        again = call("distill.py", *flags, "--use_peft", "--lora_r", 4, cwd=tmp_path)
        assert again.returncode == 1 and "other settings: `adapter.r` was 16, is 4. Go on" in again.stderr


@pytest.mark.slow
def test_distill_killed_at_random_ends_like_an_unbroken_run(tmp_path, prompts_file):
    """While prompts are answered, in training, and while a checkpoint is written."""
    flags = list(map(str, [*DISTILL, "--use_peft", "--max_steps", 30]))
    (tmp_path / "other").mkdir()
    os.link(tmp_path / "prompts.jsonl", tmp_path / "other" / "prompts.jsonl")
    assert run("distill.py", *flags, cwd=tmp_path / "other").returncode == 0
    moments, kills = random.Random(0), 0
    while kills < 8:
        process = start("distill.py", *flags, cwd=tmp_path)
        time.sleep(moments.uniform(4, 8))
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        kills += 1
    assert kills >= 2
    result = run("distill.py", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    one, other = (
        load_file(folder / "out" / "merged" / "model.safetensors") for folder in (tmp_path, tmp_path / "other")
    )
    assert all((one[name] == other[name]).all() for name in other)


@pytest.mark.slow
def test_trajectories_killed_twenty_times(tmp_path, prompts_file):
    flags = [*DISTILL[: DISTILL.index("--output_dir")], "--batch_size", 2]
    flags += [word for name, value in TEACHER.items() for word in (f"--{name}", value)] + ["--trajectories_dir"]
    assert run("generate_trajectories.py", *flags, "unbroken", cwd=tmp_path).returncode == 0
    moments = random.Random(1)
    for _ in range(20):
        process = start("generate_trajectories.py", *flags, "killed", cwd=tmp_path)
        time.sleep(moments.uniform(3.5, 6))
        process.kill()
        process.wait()
    result = run("generate_trajectories.py", *flags, "killed", cwd=tmp_path)
    assert result.returncode == 0 and "8 trajectories of" in result.stdout, result.stderr
    one, other = (distillation.Dataset.load_from_disk(tmp_path / name / "dataset") for name in ("killed", "unbroken"))
    assert one.to_list() == other.to_list()


@pytest.mark.parametrize("use_peft", [True, False])
@pytest.mark.journey
def test_fine_tune_makes_a_model_of_rows(tmp_path, use_peft):
    """From a block-causal model, with rows that are held out; started again, it has nothing left to do."""
    rows = [{"prompt": row["question"], "completion": f" {row['answer']}."} for row in PROMPTS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = LLaDAModelLM.from_pretrained(CHECKPOINT)
    model.config.block_causal_length = 16
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(CHECKPOINT).save_pretrained(tmp_path / "model")
    flags = "--model model --dtype float32 --dataset_name rows.jsonl --output_dir out --use_cpu true --report_to none"
    flags += " --per_device_train_batch_size 2 --max_length 128 --save_steps 1 --max_steps 2 --eval_size 2"
    flags += " --eval_strategy steps --eval_steps 2" + " --use_peft true" * use_peft
    result = call("fine_tune.py", *flags.split(), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "eval_masked_accuracy" in result.stdout
    assert result.stdout.splitlines()[-1].startswith(
        "In out/merged: the fine-tuned model. Next, to evaluate it on GSM8K: "
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged", trust_remote_code=True)
    assert merged.config.block_causal_length == 16
    before = model.state_dict()
    assert any((weight != before[name]).any() for name, weight in merged.state_dict().items())
    assert (tmp_path / "out" / "adapter_model.safetensors").exists() == use_peft
    again = call("fine_tune.py", *flags.split(), cwd=tmp_path)
    assert again.returncode == 0 and "The training had ended before" in again.stdout, again.stderr
    other = call("fine_tune.py", *flags.split(), "--eval_size", 8, cwd=tmp_path)
    assert other.returncode == 1 and "`eval_size=8` is not allowed: it must be less than" in other.stderr


def test_distill_says_what_is_wrong(tmp_path, prompts_file):
    flags = DISTILL.copy()
    flags[flags.index("question")] = "problem"
    result = call("distill.py", *flags, cwd=tmp_path)
    assert "`prompt_column='problem'` must be one of ['question', 'answer']" in result.stderr
    flags = DISTILL.copy()
    flags[flags.index("--judge") + 1] = "nowhere.py:judge"
    assert "there is no file 'nowhere.py'" in call("distill.py", *flags, cwd=tmp_path).stderr


@pytest.mark.parametrize(
    ("answer", "response", "is_right"),
    [
        ("#### 1,234", "it is 1234.", True),
        ("2 + 2 = <<2+2=4>>4\n#### 4", "4 apples, so 5", False),
        ("-3", "The answer is -3", True),
        ("12.5", "12.50 dollars", True),
        ("7", "seven", False),
    ],
)
def test_final_number(answer, response, is_right):
    assert judges.final_number({"answer": answer, "response": response}) == is_right


def test_passes_at_an_accuracy_are_interpolated():
    points = [SimpleNamespace(nfe=nfe, accuracy=value) for nfe, value in ((8, 0.5), (10, 0.9), (20, 0.95))]
    assert nfe_at(points, 0.7) == (pytest.approx(9), False)
    assert nfe_at(points, 0.95) == (pytest.approx(20), False)
    assert nfe_at(points, 0.4) == (8, True) and nfe_at(points, 0.96) is None
    assert spread([(9.0, False), (10.0, False), (11.0, False)]) == "10.0 (9.0 to 11.0)"
    assert spread([(9.0, True)]) == "≤ 9.0"
    assert spread([(9.0, False), None]) == "reached by 1 of 2 seeds"


def test_quantized_models_are_asked_for():
    assert "quantization_config" not in distill.init_kwargs(ModelConfig(dtype="bfloat16"))
    found = distill.init_kwargs(ModelConfig(dtype="bfloat16", load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    assert found["quantization_config"].load_in_4bit and found["device_map"] == {"": PartialState().device}


@pytest.mark.parametrize("recipe", sorted((EXAMPLES / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_understood(recipe, tmp_path):
    parser = TrlParser((distill.DistillArguments, CertaintyForcingConfig, ModelConfig))
    flags = ["--config", str(recipe), "--output_dir", str(tmp_path), "--bf16", "false"]
    arguments, config, model = parser.parse_args_and_config(flags)
    assert model.use_peft and model.lora_r == model.lora_alpha and config.threshold <= 0.5
    assert Path(arguments.judge.partition(":")[0]).name == "judges.py" and distill.load_judge(
        str(EXAMPLES.parent / arguments.judge)
    )


def test_the_settings_of_the_fine_tuning_of_real_weights_are_understood():
    parser = TrlParser((fine_tune.FineTuneArguments, MaskedDiffusionConfig, ModelConfig))
    flags = ["--config", str(EXAMPLES / "gsm8k" / "fine_tune.yaml"), "--bf16", "false"]
    arguments, config, model = parser.parse_args_and_config(flags)
    assert (arguments.dataset_name, config.max_length) == ("runs/gsm8k/rows/train.jsonl", 384)
    assert model.dtype == "float32" and not model.use_peft  # all weights, which must not be rounded


def test_the_baseline_differs_in_how_it_is_trained_alone():
    """By TRL's own command; the same rows, examples of a step, and learning rate."""
    flags = ["--bf16", "false", "--config"]
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig))
    _, baseline, model, mixture = parser.parse_args_and_config([*flags, str(EXAMPLES / "gsm8k/autoregressive.yaml")])
    parser = TrlParser((fine_tune.FineTuneArguments, MaskedDiffusionConfig, ModelConfig))
    arguments, ours, our_model = parser.parse_args_and_config([*flags, str(EXAMPLES / "gsm8k/fine_tune.yaml")])
    assert [mixture.datasets[0].data_files, model.dtype] == [arguments.dataset_name, our_model.dtype]
    for name in ("max_length", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
                 "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta2"):  # fmt: skip
        assert getattr(baseline, name) == getattr(ours, name), name


@pytest.mark.parametrize("config", sorted((EXAMPLES / "accelerate_configs").iterdir()), ids=lambda path: path.stem)
def test_accelerate_configs_are_understood(config):
    loaded = load_config_from_file(str(config))
    kinds = {"single_gpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert loaded.distributed_type == kinds[config.stem] and loaded.mixed_precision == "bf16"


def test_the_picture_of_the_proof_is_drawn_again(tmp_path):
    shutil.copy(STUDENT / "distillation.json", tmp_path)
    result = call("word_problems/distillation.py", "--redraw", tmp_path)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["accuracy_against_nfe.png", "distillation.json"]
    result = call("word_problems/distillation.py", "--redraw", tmp_path / "none")
    assert result.returncode == 1 and "No such file" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.slow
def test_the_distillation_study_runs_and_goes_on(tmp_path):
    flags = "--num_prompts 8 --max_steps 1 --batch_size 2 --problems 2 --seeds 0 --rounds 2 --output_dir out".split()
    variants = ["trajectory loss only", "both losses", "certainty loss only"]
    part = run("word_problems/distillation.py", *flags, "--until", "curves", "--variants", *variants[2:], cwd=tmp_path)
    assert part.returncode == 0 and "| teacher |" not in part.stdout, part.stderr
    result = run("word_problems/distillation.py", *flags, "--variants", *variants, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for name in ("both losses, round 2", "trajectory loss only, round 2", "certainty loss only"):
        assert f"| {name} |" in result.stdout
    assert (tmp_path / "out" / "accuracy_against_nfe.png").stat().st_size > 10_000
    results = json.loads((tmp_path / "out" / "distillation.json").read_text())
    assert [len(student["rounds"]) for student in results["students"]] == [2, 2, 1]
    chosen = load_measurements(tmp_path / "out" / "student" / "results.json")
    kinds = [("teacher", False), (None, False), ("teacher", True), (None, True)]
    assert [(point.model, point.decoding["stop_at_eos"]) for point in chosen] == kinds
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "student", trust_remote_code=True)
    assert model.generation_config.unmasking in ("entropy_threshold", "entropy_bound")
    again = run("word_problems/distillation.py", *flags, "--variants", *variants, cwd=tmp_path)
    assert again.stdout.splitlines()[-12:] == result.stdout.splitlines()[-12:] and "train_loss" not in again.stdout


def test_the_distillation_study_says_what_a_report_needs(tmp_path):
    result = call("word_problems/distillation.py", "--seeds", 1, cwd=tmp_path)
    assert result.returncode == 2 and "a report needs seed 0" in result.stderr


@pytest.mark.slow
def test_the_comparison_of_filters_runs_and_goes_on(tmp_path):
    flags = "--prompts 16 --problems 2 --long_problems 0 --epochs 3 --output_dir out".split()
    result = run("word_problems/learned_filter.py", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = [line for line in result.stdout.splitlines() if line.startswith("| ")]
    for name in ("filter, end-of-text prediction, dual cache", "student, richer filter", "student, oracle (training"):
        assert any(row.startswith(f"| {name}") for row in rows), name
    measured = (tmp_path / "out" / "results.json").read_bytes()
    again = run("word_problems/learned_filter.py", *flags, cwd=tmp_path)
    other = run("word_problems/learned_filter.py", *flags, "--epochs", 4, cwd=tmp_path)
    assert other.returncode == 1 and "'epochs': '3'}, not of" in other.stderr
    tables = [each.stdout[each.stdout.index("Answers of up to") :] for each in (result, again)]
    assert tables[0] == tables[1]
    assert (tmp_path / "out" / "results.json").read_bytes() == measured, "nothing was timed again"
