"""Let a teacher answer prompts, and keep the order in which it wrote its answers.

After a kill, the same command goes on. `datasets.load_from_disk("runs/gsm8k_trajectories/dataset")` has the result.

    accelerate launch examples/generate_trajectories.py --model_name_or_path GSAI-ML/LLaDA-8B-Instruct \\
        --dtype bfloat16 --dataset_name openai/gsm8k --dataset_config main --prompt_column question \\
        --trajectories_dir runs/gsm8k_trajectories --judge examples/judges.py:final_number
"""

from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import load_dataset, load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, TrlParser, get_quantization_config
from yaml import YAMLError

from dparallel.evaluation.command_line import load_from_file
from dparallel.hub_cards.command_line import help_of, plain_errors
from dparallel.hub_cards.hub_ids import is_hub_id
from dparallel.modeling import POLICIES
from dparallel.trainer import generate_trajectories


@dataclass
class ModelArguments(ModelConfig):
    """TRL's, whose model can be called as it is in the other commands."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the model.", "aliases": ["--model"]}
    )


@dataclass
class DatasetArguments:
    """Where rows come from."""

    dataset_name: str = field(
        metadata={"help": "Hub id, folder of save_to_disk(), or .json, .jsonl or .parquet file of a dataset."}
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a dataset of the Hub (default: its only one)."}
    )
    dataset_split: str = field(
        default="train", metadata={"help": "Split of the dataset, or a slice like `train[:1000]`."}
    )


@dataclass
class PromptArguments(DatasetArguments):
    """Where prompts come from, and where the answers to them go."""

    prompt_column: str = field(
        default="prompt", metadata={"help": "Column with the prompts, which are text or messages."}
    )
    as_chat: bool = field(
        default=True, metadata={"help": "Make a user's message of each prompt that is text, for the chat template."}
    )
    trajectories_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder that the trajectories are saved in; generate_trajectories.py must be told (default: for "
            "distill.py, the folder `trajectories` in its `output_dir`)."
        },
    )
    judge: str | None = field(
        default=None,
        metadata={
            "help": "file.py:function that takes a row and says whether its `response` is right (default: answers "
            "are not judged)."
        },
    )
    shard_size: int = field(default=64, metadata={"help": "Number of prompts whose answers are saved together."})


@dataclass
class TrajectoryArguments(PromptArguments):
    """How they are answered."""

    unmasking: str = field(
        default="confidence",
        metadata={
            "help": "Policy that the teacher decodes with; 'confidence' writes one token a pass.",
            "choices": sorted(POLICIES),
        },
    )
    threshold: float | None = field(
        default=None, metadata={"help": "Threshold of that policy, if it has one (default: the policy's own)."}
    )
    max_new_tokens: int | None = field(
        default=None,
        metadata={"help": "Length of the answers in tokens (default: the teacher's own, as it was saved, or 256)."},
    )
    batch_size: int = field(default=16, metadata={"help": "Number of prompts that each process decodes at a time."})


def parse_arguments(documentation, *kinds):
    """One instance of each of these dataclasses, from flags and from the file that `--config` names; `--help` shows
    the docstring of the command's module, too."""
    with plain_errors(ValueError, OSError, YAMLError):
        return TrlParser(kinds, **help_of(documentation)).parse_args_and_config()


def load_rows(arguments):
    path = Path(arguments.dataset_name)
    for folder in (path, path / "dataset"):  # of this script, too
        if (folder / "dataset_info.json").exists():
            return load_from_disk(folder)
    if path.suffix in (".json", ".jsonl", ".parquet"):
        kind = "parquet" if path.suffix == ".parquet" else "json"
        return load_dataset(kind, data_files=str(path), split=arguments.dataset_split)
    config = None if path.is_dir() else arguments.dataset_config
    try:
        return load_dataset(arguments.dataset_name, config, split=arguments.dataset_split)
    except ConnectionError as error:
        raise ConnectionError(f"{error}. Without a connection, name a file: `--dataset_name rows.jsonl`.") from error


def load_judge(name):
    """`file.py:function` to the function; None or nothing to None."""
    if not name:
        return None
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise ValueError(f"`judge={name!r}` must be file.py:function, but there is no file {path!r}.")
    judge = load_from_file(path, function)
    if not callable(judge):
        raise ValueError(f"`judge={name!r}`: {path} has no function {function!r}.")
    return judge


def init_kwargs(model_arguments):
    """Of `from_pretrained`, for the model."""
    found = {
        "revision": model_arguments.model_revision,
        "dtype": model_arguments.dtype,
        "attn_implementation": model_arguments.attn_implementation,
    }
    quantization = get_quantization_config(model_arguments)
    if quantization is not None:
        found |= {"quantization_config": quantization, "device_map": {"": PartialState().device}}
    return found


def as_prompts(arguments, rows):
    """Rows with the prompts in the column `prompt`, as messages if they are to be."""
    if arguments.prompt_column not in rows.column_names:
        raise ValueError(f"`prompt_column={arguments.prompt_column!r}` must be one of {rows.column_names}.")
    if arguments.prompt_column != "prompt":
        rows = rows.rename_column(arguments.prompt_column, "prompt")
    if arguments.as_chat and isinstance(rows[0]["prompt"], str):
        rows = rows.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    return rows


def teacher_trajectories(arguments, model_arguments, prompts, judge, batch_size, **decoding):
    """Trajectories of the model that `model_arguments` name, which are also saved, in `trajectories_dir/dataset`;
    `decoding` holds arguments of its `generate()`."""
    name = model_arguments.model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(name, revision=model_arguments.model_revision)
    model = AutoModelForCausalLM.from_pretrained(name, **init_kwargs(model_arguments))
    if getattr(model, "hf_quantizer", None) is None:  # those lie where they are to be
        model.to(PartialState().device)
    dataset = generate_trajectories(
        model,
        tokenizer,
        prompts,
        arguments.trajectories_dir,
        judge,
        batch_size=batch_size,
        shard_size=arguments.shard_size,
        **decoding,
    )
    if is_hub_id(arguments.dataset_name):
        dataset.info.dataset_name = arguments.dataset_name  # for the cards of what is made from it
    if PartialState().is_main_process:
        dataset.save_to_disk(Path(arguments.trajectories_dir) / "dataset")
    return dataset


def main():
    arguments, model_arguments = parse_arguments(__doc__, TrajectoryArguments, ModelArguments)
    # Processes wait for the one that decodes longest.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
    with plain_errors(ValueError, OSError):
        if arguments.trajectories_dir is None:
            raise ValueError("`trajectories_dir` must be given.")
        prompts, judge = as_prompts(arguments, load_rows(arguments)), load_judge(arguments.judge)
    decoding = {"unmasking": arguments.unmasking, "max_new_tokens": arguments.max_new_tokens}
    if arguments.threshold is not None:
        decoding["threshold"] = arguments.threshold
    dataset = teacher_trajectories(arguments, model_arguments, prompts, judge, arguments.batch_size, **decoding)
    if state.is_main_process:
        passes, judged = dataset["num_forward_passes"][:], [row for row in dataset["correct"][:] if row is not None]
        right = f", {sum(judged)} of {len(judged)} right" if judged else ""
        print(f"{len(dataset)} trajectories of {sum(passes) / len(passes):.1f} passes each{right}.")
        folder = Path(arguments.trajectories_dir) / "dataset"
        print(
            f"In {folder}: the dataset. Next, to train a student with it: accelerate launch examples/distill.py "
            f"--model_name_or_path {model_arguments.model_name_or_path} --dataset_name {folder} "
            "--output_dir runs/distilled"
        )


if __name__ == "__main__":
    main()
