"""What the commands that evaluate have in common."""

import argparse
import importlib.util
import shlex
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import extract_commit_hash

from dparallel.hub_cards.command_line import CommandParser, plain_errors
from dparallel.hub_cards.hub_ids import check_folder_or_hub_id, file_of
from dparallel.hub_cards.measurements import RESULTS_FILE, Measurement
from dparallel.hub_cards.merge import ADAPTER_FILE, load_adapted, load_tokenizer
from dparallel.modeling import POLICIES, SCHEDULES  # and the model families are registered with AutoModelForCausalLM
from dparallel.modeling.generation_config_diffusion import BLOCK_CACHES

from .evaluation import DECODING_ARGUMENTS, evaluate_task, origin_of
from .tasks import TASKS, Task

HEADER = "| task | model | decoding | NFE | TPF | accuracy % (95% interval) |\n" + "| --- " * 6 + "|"


def load_from_file(path: str | Path, name: str) -> Any:
    """What a Python file calls `name`; None if it has no such thing."""
    spec: Any = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(path).parent))  # a file may import its neighbours
    spec.loader.exec_module(module)
    return getattr(module, name, None)


def find_task(name: str) -> Task:
    """One of `TASKS` by its key, or `path.py:NAME` for one of your own."""
    if name in TASKS:
        return TASKS[name]
    path, _, attribute = name.rpartition(":")
    if not path or not Path(path).is_file():
        raise ValueError(
            f"`task={name!r}` is not allowed: it must be one of {sorted(TASKS)}, or path.py:NAME, "
            f"such as examples/word_problems/evaluate_word_problems.py:WORD_PROBLEMS."
        )
    task = load_from_file(path, attribute)
    if not isinstance(task, Task):
        raise ValueError(f"`task={name!r}` is not allowed: {path} has no Task of the name {attribute!r}.")
    return task


def add_task_argument(parser: argparse.ArgumentParser) -> None:
    """What `find_task` finds."""
    parser.add_argument(
        "--task", required=True, help="benchmark: gsm8k, math, mbpp, humaneval, or path.py:NAME for one of your own"
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="Hub id or folder of a model, or of a LoRA adapter")
    parser.add_argument(
        "--adapter", help="Hub id or folder of a LoRA adapter for the model, which is not merged (default: none)"
    )
    dtypes = ["auto", "bfloat16", "float16", "float32"]
    parser.add_argument(
        "--dtype",
        choices=dtypes,
        help="data type of the weights (default: auto, which is as saved, on a GPU, and float32 on a CPU)",
    )
    parser.add_argument("--revision", default="main", help="branch, tag or commit of the model's repository")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run the Python code of the model's repository"
    )


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        help="JSON-lines file, or folder of such files, with the questions (default: what the environment variable "
        "DPARALLEL_DATA says, or else the Hub)",
    )
    parser.add_argument(
        "--split", help="split of the data (default: the one that published results are of, mostly test)"
    )
    parser.add_argument("--limit", type=int, help="number of questions, from the first on (default: all)")
    parser.add_argument(
        "--num_fewshot", type=int, help="number of examples before each question (default: the task's own)"
    )
    parser.add_argument("--max_new_tokens", type=int, help="tokens of an answer at most (default: the task's own)")
    parser.add_argument("--batch_size", type=int, help="number of questions that are decoded at a time (default: 16)")
    parser.add_argument(
        "--shard_size",
        type=int,
        help="number of questions that are saved together; only among those do ended rows make room for others "
        "(default: 8 times the batch size)",
    )


def _given(arguments, *names) -> dict:
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def in_words(arguments: argparse.Namespace, *names: str) -> str:
    """The flags of these names that were given, to stand in a command that comes next."""
    return "".join(f" --{name} {shlex.quote(str(value))}" for name, value in _given(arguments, *names).items())


def data_arguments(arguments: argparse.Namespace, task: Task) -> dict:
    """Those of `evaluate_task`; after a look, which takes less time than loading a model, whether the task can be
    done with them."""
    batch_size, shard_size = arguments.batch_size, arguments.shard_size
    if batch_size is None:
        batch_size = min(16, shard_size or 16)
    if shard_size is None:
        shard_size = max(8 * batch_size, 1)
    if not 1 <= batch_size <= shard_size:
        allowed = f"a batch is of one shard, so it must be from 1 to --shard_size, {shard_size}"
        raise ValueError(f"`batch_size={batch_size}` is not allowed: {allowed}.")
    task.require_sandbox()
    asked = _given(arguments, "data", "split", "limit", "num_fewshot")
    task.questions(**asked)
    return {**asked, **_given(arguments, "max_new_tokens"), "batch_size": batch_size, "shard_size": shard_size}


def load_model(arguments: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model for decoding, on the device of this process, and its tokenizer. `--model` may be an adapter: its base
    model is loaded, and decodes by what the adapter was distilled for, as with `--adapter`."""
    for name, value in _given(arguments, "model", "adapter").items():
        check_folder_or_hub_id(name, value)
    is_gpu = torch.cuda.is_available()
    device = PartialState(cpu=not is_gpu, timeout=timedelta(days=1)).device  # one process may wait for others' answers
    kept = {"trust_remote_code": arguments.trust_remote_code}
    dtype = arguments.dtype or ("float32" if device.type == "cpu" else "auto")
    base, adapter, adapter_revision = _base_and_adapter(arguments)
    if base is not None:
        kept["revision"] = arguments.revision
    if adapter is None:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **kept)
    else:
        model = load_adapted(adapter, base, adapter_revision=adapter_revision, dtype=dtype, **kept)
        base = base or model.active_peft_config.base_model_name_or_path
    tokenizer = load_tokenizer(adapter, base, adapter_revision=adapter_revision, padding_side="left", **kept)
    return model.to(device).eval(), tokenizer


def is_adapter(model: object, revision: str | None = None) -> bool:
    """Is a folder or Hub id that of an adapter, and not of a whole model?"""
    return isinstance(model, (str, Path)) and file_of(model, ADAPTER_FILE, revision) is not None


def _base_and_adapter(arguments):
    """What is to be loaded: the base model (None: the one that the adapter names), the adapter, and its revision."""
    if not is_adapter(arguments.model, arguments.revision):
        return arguments.model, arguments.adapter, None
    if arguments.adapter:
        raise ValueError(
            f"`adapter={str(arguments.adapter)!r}` is not allowed: `model={str(arguments.model)!r}` is an adapter."
        )
    return None, arguments.model, arguments.revision


def origin_from(arguments: argparse.Namespace, model: PreTrainedModel) -> dict:
    """What results say of where the model is from, see `Measurement`."""
    found = origin_of(model)
    _, adapter, revision = _base_and_adapter(arguments)
    if adapter:
        found["adapter"] = Path(adapter).name if Path(adapter).is_dir() else str(adapter)
        commit = extract_commit_hash(str(file_of(adapter, ADAPTER_FILE, revision)), None)
        if commit is not None:
            found["adapter_revision"] = commit
    return found


def table_row(measurement: Measurement, model: str) -> str:
    return (
        f"| {measurement.task}{measurement.shots}, {measurement.num_examples} | {model} | {measurement.settings} "
        f"| {measurement.nfe:.1f} | {measurement.tpf:.2f} | {measurement.accuracy_in_words} |"
    )


def add_decoding_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `generate()` that `DECODING_ARGUMENTS` names."""
    group = parser.add_argument_group("decoding", "arguments of generate(); by default as the checkpoint was saved")

    def add(flag, text, **settings):
        group.add_argument(flag, help=f"{text} (default: the checkpoint's)", **settings)

    add("--unmasking", "policy that decides which tokens are written", choices=sorted(POLICIES))
    add("--threshold", "threshold of a thresholded policy", type=float)
    add("--steps", "number of passes of a scheduled policy", type=int)
    add("--steps_per_block", "number of passes of a scheduled policy for each block", type=int)
    add("--schedule", "how a scheduled policy spreads its steps", choices=sorted(SCHEDULES))
    add("--block_length", "tokens of a block", type=int)
    caches = "what is kept between passes: nothing, keys and values before the block, also those behind it, or, in a "
    caches += "block-causal model, exact ones"
    add("--block_cache", caches, choices=BLOCK_CACHES)
    refreshes = "what is computed anew when a block begins: the whole canvas, or the block before it"
    add("--cache_refresh", refreshes, choices=["full", "previous_block"])
    add("--cache_refresh_interval", "passes after which the cache is computed anew within a block", type=int)
    add("--stop_at_eos", "end an answer at its end-of-text", action="store_true", default=None)
    no_stop = {"dest": "stop_at_eos", "action": "store_false", "default": None}
    add("--no_stop_at_eos", "decode all blocks of each answer", **no_stop)
    add("--eos_threshold", "end an answer at an end-of-text that is predicted with this probability", type=float)


def evaluate_from_command_line(task: Task) -> None:
    """All that a benchmark's script does, whose docstring is the text of `--help`."""
    parser = CommandParser(
        sys.modules["__main__"].__doc__ or f"Accuracy and forward passes of a model on {task.name}."
    )
    add_model_arguments(parser)
    add_data_arguments(parser)
    add_decoding_arguments(parser)
    folder = Path("runs") / task.name.lower().replace(" ", "_")
    parser.add_argument("--output_dir", type=Path, default=folder, help="folder for the results and all answers")
    arguments = parser.parse_args()
    settings = _given(arguments, *DECODING_ARGUMENTS)

    with plain_errors(ValueError, OSError):
        data = data_arguments(arguments, task)
        model, tokenizer = load_model(arguments)
        origin = origin_from(arguments, model)
        result = evaluate_task(task, model, tokenizer, arguments.output_dir, origin=origin, **data, **settings)
    if PartialState().is_main_process:
        print(f"{HEADER}\n{table_row(result, Path(arguments.model).name)}\n")
        command = f"python -m dparallel.hub_cards.push_model {arguments.model} user/my-model"
        print(
            f"In {arguments.output_dir}: results.json and samples.jsonl (all answers). Next, to share the model with "
            f"these numbers on its card: {command} --results {arguments.output_dir / RESULTS_FILE}"
        )
