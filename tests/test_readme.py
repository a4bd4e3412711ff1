"""Every code block of README.md runs as it stands, on a Hub of our own that has small models and datasets under the
names of the page.

- The Python blocks of a page are one session, from top to bottom, as a reader would type them.
- The shell blocks are run by bash with commands in the place of python, pip, make, ... that only write down how they
  were called. Flags, scripts, targets and extras must exist; in page order, what can be small is then run, too.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from importlib.metadata import metadata
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from dparallel.modeling import POLICIES
from tests.families import FAMILIES
from tests.golden import CHECKPOINT, STUDENT
from tests.hub_cards.hub_server import LARGE, Blob, HubServer, Repo
from tests.scripts import EXAMPLES, check_arguments, load, run, split_command

ROOT = EXAMPLES.parent
PAGE = ROOT / "README.md"
PAGES = [PAGE, *sorted(path for path in EXAMPLES.rglob("README.md") if path.parent not in (CHECKPOINT, STUDENT))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# What stands for a model of the Hub: the student (a LLaDA that answers word problems), or a Dream of random weights.
MODELS = {
    "GSAI-ML/LLaDA-8B-Instruct": "student", "GSAI-ML/LLaDA-8B-Base": "student", "GSAI-ML/LLaDA-1.5": "student",
    "Zigeng/dParallel-LLaDA-8B-instruct": "student", "user/my-model": "student", "user/repo": "student",
    "Dream-org/Dream-v0-Instruct-7B": "dream", "Dream-org/Dream-v0-Base-7B": "dream",
    "Zigeng/dParallel_Dream_7B_Instruct": "dream",
}  # fmt: skip
DATASETS = ("openai/gsm8k", "trl-lib/Capybara")
# A block needs the extra of the last of these packages that it imports; each extra has all of those before it.
EXTRAS = {
    "": ("dparallel.modeling",),
    "train": ("dparallel.trainer", "dparallel.hub_cards", "datasets", "peft", "trl"),
}
EXTRAS |= {"eval": ("dparallel.evaluation", "matplotlib"), "lm-eval": ("lm_eval",)}
NOTED = (
    "accelerate",
    "cd",
    "cp",
    "git",
    "hf",
    "huggingface-cli",
    "make",
    "mkdir",
    "pip",
    "python",
    "python3",
    "source",
    "trl",
)
# Commands that are run, too, with these flags behind those of the page.
TRAINING = "--use_cpu true --bf16 false --report_to none --max_steps 1 --per_device_train_batch_size 1".split()
FEW = ["--limit", "2", "--batch_size", "2", "--shard_size", "2"]
SMALL = {
    "quickstart.py": ["--problems", "1"],
    "visualize.py": [],
    "generate_trajectories.py": ["--dtype", "float32"],
    "distill.py": [*TRAINING, "--dtype", "float32", "--eval_size", "0"],
    "gsm8k/evaluate_gsm8k.py": FEW,
    "word_problems/evaluate_word_problems.py": FEW,
    "push_to_hub.py": [],
    "dparallel.hub_cards.push_model": [],
    "dparallel.hub_cards.push_dataset": [],
    "dparallel.evaluation.sweep": [*FEW, "--unmasking", "entropy_threshold=0.1,0.5", "--block_cache", "none"],
    "dparallel.evaluation.calibrate": [*FEW, "--thresholds", "0.1", "0.5"],
}  # fmt: skip
# Where no command of the page has made a folder that another takes: one that has the like.
MADE = {"runs/gsm8k_trajectories": "runs/llada"}


class Block(NamedTuple):
    """Of a page: where its code begins, in lines from 1, its language and its code."""

    line: int
    language: str
    code: str


def blocks_of(page, *languages) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = [Block(text.count("\n", 0, match.start()) + 2, *match.groups()) for match in BLOCK.finditer(text)]
    return [block for block in found if block.language in languages]


def extra_of(code) -> str:
    """The extra of pyproject.toml that a block of Python needs, by what it imports."""
    imported = set(re.findall(r"^\s*(?:from|import) ([\w.]+)", code, re.MULTILINE))
    needed = [extra for extra, packages in EXTRAS.items() if any(name.startswith(packages) for name in imported)]
    return needed[-1] if needed else ""


# --- the Hub ---------------------------------------------------------------------------------------------------------


def publish(hub, kind, name, folder):
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    repo = hub.repos[kind, name] = Repo(private=False)
    repo.commit("main", "all", {name: Blob(path.read_bytes(), name.endswith(LARGE)) for name, path in files.items()})


def make_dream(folder):
    FAMILIES["dream"].small(hidden_size=64).save_pretrained(folder)
    AutoTokenizer.from_pretrained(CHECKPOINT).save_pretrained(folder)
    return folder


def make_datasets(folder):
    """Six word problems in the columns of GSM8K, and as conversations."""
    problems = list(load("word_problems/problems.py").generate_problems("train", 6, 3))
    rows = [{"question": each.question, "answer": f"{each.solution}\n#### {each.answer}"} for each in problems]
    chats = [
        {"messages": [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]}
        for row in rows
    ]
    for name, content in zip(DATASETS, (rows, chats), strict=True):
        data_files = [{"split": split, "path": f"{split}.parquet"} for split in ("train", "test")]
        config = {"configs": [{"config_name": "main", "default": True, "data_files": data_files}]}
        (folder / name).mkdir(parents=True)
        (folder / name / "README.md").write_text(f"---\n{json.dumps(config)}\n---\n", encoding="utf-8")
        for split in ("train", "test"):
            Dataset.from_list(content).to_parquet(folder / name / f"{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """What a process that uses it needs in its environment is in `environment`."""
    made = tmp_path_factory.mktemp("made")
    folders = {"student": STUDENT, "dream": make_dream(made / "dream")}
    data = make_datasets(made / "datasets")
    with HubServer() as server:
        for name, kind in MODELS.items():
            publish(server, "models", name, folders[kind])
        for name in DATASETS:
            publish(server, "datasets", name, data / name)
        server.environment = {
            "HF_ENDPOINT": server.url, "HF_HOME": str(made / "home"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": server.token,
            "HF_HUB_DISABLE_XET": "1", "HF_ALLOW_CODE_EVAL": "1", "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        yield server


def unknown(hub) -> str:
    """What to say of repositories that were asked for, and which this file does not know."""
    asked = re.findall(
        r"^\w+ (?:/api)?/(?:(models|datasets)/)?([^/\s]+/[^/\s]+)", "\n".join(hub.requests), re.MULTILINE
    )
    asked = sorted(
        {
            f"{name} ({kind or 'models'})"
            for kind, name in asked
            if (kind or "models", name) not in hub.repos and not name.startswith("api/")
        }
    )
    return f"\nThe page asks for what has no stand-in in {Path(__file__).name}: {', '.join(asked)}." if asked else ""


@pytest.fixture
def folder(tmp_path):
    """Where a reader is: the root of a checkout, as far as pages go."""
    (tmp_path / "examples").symlink_to(EXAMPLES)
    return tmp_path


# --- Python ----------------------------------------------------------------------------------------------------------


def run_session(hub, folder, blocks, python=sys.executable, **environment):
    (folder / "session.json").write_text(json.dumps([str(PAGE), [(b.line, b.code) for b in blocks]]), encoding="utf-8")
    result = subprocess.run(
        [python, ROOT / "tests" / "readme_session.py", "session.json"], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **hub.environment, **environment},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:] + unknown(hub)
    return result.stdout


@pytest.mark.journey
def test_the_python_blocks_are_a_session(hub, folder):
    blocks = blocks_of(PAGE, "python")
    assert blocks
    print(run_session(hub, folder, blocks))


def test_the_policy_of_the_other_page_decodes():
    """CONTRIBUTING.md's."""
    (block,) = blocks_of(ROOT / "CONTRIBUTING.md", "python")
    model, prompt = FAMILIES["llada"].small(), torch.tensor([[5, 6, 7]])

    def passes(threshold):
        output = model.generate(
            prompt, max_new_tokens=8, unmasking="two_ways", threshold=threshold, return_dict_in_generate=True
        )
        return output.num_forward_passes.item()

    try:
        exec(block.code, {})
        assert (passes(0), passes(100)) == (8, 1)
    finally:
        POLICIES.pop("two_ways", None)


@pytest.mark.slow
def test_the_python_blocks_need_no_other_extras(hub, folder):
    """An environment that gets the extras one by one, and the blocks that need no more than it has."""
    declared = metadata("dparallel").get_all("Provides-Extra")
    text, blocks = PAGE.read_text(encoding="utf-8"), blocks_of(PAGE, "python")
    needed = [extra_of(block.code) for block in blocks]
    source = shutil.copytree(
        ROOT, folder / "source", ignore=shutil.ignore_patterns(".*", "*.egg-info", "build", "runs")
    )
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, "torch==2.13.0"], check=True)
    for extra in [each for each in EXTRAS if each in needed]:
        assert not extra or (extra in declared and f"[{extra}]" in text), f"README.md does not tell of {extra!r}"
        subprocess.run([*install, f"{source}[{extra}]" if extra else str(source)], check=True)
        kept = [
            block
            for block, need in zip(blocks, needed, strict=True)
            if list(EXTRAS).index(need) <= list(EXTRAS).index(extra)
        ]
        (folder / f"with-{extra}").mkdir()
        (folder / f"with-{extra}" / "examples").symlink_to(EXAMPLES)
        run_session(hub, folder / f"with-{extra}", kept, python, PYTHONPATH="")


# --- the shell -------------------------------------------------------------------------------------------------------


def commands_of(block, folder) -> list[list[str]]:
    """What a block of the shell would run, written down by functions in the commands' place."""
    noted = "".join(f'{name}() {{ printf "%s\\037" {name} "$@" >&9; printf "\\036" >&9; }}\n' for name in NOTED)
    script = f"exec 9>noted\n{noted}set -eu\n{block.code.replace('.venv/bin/', '')}"
    result = subprocess.run(
        [shutil.which("bash"), "-c", script], cwd=folder, capture_output=True, text=True, env={"PATH": "/nowhere"}
    )
    assert result.returncode == 0, f"line {block.line}: {result.stderr}"
    written = (folder / "noted").read_text(encoding="utf-8").split("\036")
    return [command.split("\037")[:-1] for command in written if command]


def shell_commands(page, folder):
    return [
        (block.line, command)
        for block in blocks_of(page, "bash", "sh", "shell")
        for command in commands_of(block, folder)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_commands_are_understood(page, tmp_path):
    """Scripts, modules, flags with their values, targets of make, extras."""
    declared = metadata("dparallel").get_all("Provides-Extra")
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for line, words in shell_commands(page, tmp_path):
        where, arguments = f"{page.name}:{line}: {' '.join(words)}", [each for each in words[1:] if "=" not in each]
        if words[0] == "make":
            assert set(arguments) <= set(targets), where
        elif words[0] == "pip":
            extras = re.findall(r"\[([\w,-]+)\]", where)
            assert {name for each in extras for name in each.split(",")} <= set(declared), where
        elif words[0] == "trl":
            assert (ROOT / words[words.index("--config") + 1]).is_file(), where
        elif (command := split_command(words)) is not None:
            check_arguments(*command)


@pytest.mark.slow
def test_the_commands_run(hub, folder):
    """In page order and in one folder, so that one finds what another has made."""
    for line, words in shell_commands(PAGE, folder):
        command = split_command(words)
        if command is not None and command[0] in SMALL:
            name, arguments = command
            arguments = [MADE.get(each, each) if not (folder / each).exists() else each for each in arguments]
            result = run(name, *arguments, *SMALL[name], cwd=folder, **hub.environment)
            assert result.returncode == 0, f"line {line}: {words}\n{result.stderr[-3000:]}{unknown(hub)}"
