"""What the commands that evaluate have in common."""

import argparse
import importlib.util
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
from dparallel.hub_cards.measurements import Measurement
from dparallel.hub_cards.merge import load_adapted, load_tokenizer
from dparallel.modeling import POLICIES, SCHEDULES  # and the model families are registered with AutoModelForCausalLM

from .evaluation import DECODING_ARGUMENTS, evaluate_task, origin_of
from .tasks import TASKS, Task

ADAPTER_FILE = "adapter_config.json"
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
        raise ValueError(f"`task={name!r}` is not allowed: it must be one of {sorted(TASKS)}, or path.py:NAME.")
    task = load_from_file(path, attribute)
    if not isinstance(task, Task):
        raise ValueError(f"`task={name!r}` is not allowed: {path} has no Task of the name {attribute!r}.")
    return task


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="Hub id or folder, also of a LoRA adapter")
    parser.add_argument("--adapter", help="Hub id or folder of a LoRA adapter for it, which is not merged")
    dtypes = ["auto", "bfloat16", "float16", "float32"]
    parser.add_argument("--dtype", choices=dtypes, help="default: auto, as saved, on a GPU, float32 on a CPU")
    parser.add_argument("--revision", default="main", help="branch, tag or commit of the model's repository")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the repository's own Python code")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", help="JSON-lines file, or folder of them, instead of the Hub (also DPARALLEL_DATA)")
    parser.add_argument("--split", help="default: the one that is published, test")
    parser.add_argument("--limit", type=int, help="the first so many questions")
    parser.add_argument("--num_fewshot", type=int, help="examples before each question")
    parser.add_argument("--max_new_tokens", type=int, help="of an answer")
    parser.add_argument("--batch_size", type=int, help="questions decoded at a time; default: 16")
    parser.add_argument("--shard_size", type=int, help="questions saved together; default: 32, or more for a batch")


def _given(arguments, *names) -> dict:
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def data_arguments(arguments: argparse.Namespace, task: Task) -> dict:
    """Those of `evaluate_task`; after a look, which takes less time than loading a model, whether the task can be
    done with them."""
    batch_size, shard_size = arguments.batch_size, arguments.shard_size
    if shard_size is None:
        shard_size = max(32, batch_size or 0)
    if batch_size is None:
        batch_size = min(16, shard_size)
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


def evaluate_from_command_line(task: Task) -> None:
    """All that a benchmark's script does, whose docstring is the text of `--help`."""
    parser = CommandParser(
        sys.modules["__main__"].__doc__ or f"Accuracy and forward passes of a model on {task.name}."
    )
    add_model_arguments(parser)
    add_data_arguments(parser)
    decoding = parser.add_argument_group("decoding", "what is not given is as the checkpoint has it")
    decoding.add_argument("--unmasking", choices=sorted(POLICIES))
    decoding.add_argument("--threshold", type=float, help="of the policy")
    decoding.add_argument("--steps", type=int, help="of a scheduled policy")
    decoding.add_argument("--schedule", choices=sorted(SCHEDULES), help="how a scheduled policy spreads its steps")
    decoding.add_argument("--block_length", type=int)
    decoding.add_argument("--block_cache", choices=["none", "prefix", "dual"])
    decoding.add_argument("--cache_refresh", choices=["full", "previous_block"])
    decoding.add_argument("--cache_refresh_interval", type=int)
    decoding.add_argument("--stop_at_eos", action="store_true", default=None, help="end an answer at its end-of-text")
    decoding.add_argument("--no_stop_at_eos", dest="stop_at_eos", action="store_false", default=None,
                          help="decode all blocks of each answer")  # fmt: skip
    decoding.add_argument("--eos_threshold", type=float)
    parser.add_argument("--output_dir", type=Path, default=Path("runs") / task.name.lower().replace(" ", "_"))
    arguments = parser.parse_args()
    settings = _given(arguments, *DECODING_ARGUMENTS)

    with plain_errors(ValueError, OSError):
        data = data_arguments(arguments, task)
        model, tokenizer = load_model(arguments)
        origin = origin_from(arguments, model)
        result = evaluate_task(task, model, tokenizer, arguments.output_dir, origin=origin, **data, **settings)
    if PartialState().is_main_process:
        print(f"{HEADER}\n{table_row(result, Path(arguments.model).name)}\n")
        print(f"In {arguments.output_dir}: results.json and samples.jsonl.")
