"""A teacher's decoding trajectories: its answers, and the order in which it wrote them."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, Value, concatenate_datasets
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .resumable_shards import map_in_shards
from .tokenization import tokenize_prompt

COLUMNS = "example_id input_ids prompt_length response num_forward_passes unmasking_step correct seed settings".split()


def generate_trajectories(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Dataset,
    output_dir: str | Path,
    judge: Callable[[dict], bool] | None = None,
    *,
    batch_size: int = 16,
    shard_size: int = 64,
    seed: int = 0,
    num_proc: int | None = None,
    max_new_tokens: int | None = None,
    unmasking: str = "confidence",
    **settings: Any,
) -> Dataset:
    """Let a teacher answer prompts with `model.generate()`, by default greedily and one token a pass: the slow
    trajectory that dParallel distils (https://arxiv.org/abs/2509.26488, section 3.1).

    Work is spread over the processes of `accelerate launch`, and saved as it goes: after a kill, the same call goes on
    with what is missing and gives the same rows as an unbroken run.

    Args:
        model (`PreTrainedModel`): the teacher, on its device.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        prompts (`Dataset`): with a column `prompt` of text or messages, and where it is messages `tools` and
            `chat_template_kwargs`, as in TRL's datasets; all columns are carried along.
        output_dir (`str` or `Path`): where shards go; one folder for one job.
        judge (`Callable[[dict], bool]`, *optional*): is the answer right? It gets a row, with all columns, and must
            always say the same of it. Verdicts are not saved: a changed judge needs no new decoding.
        batch_size (`int`): prompts that are answered at the same time, of one shard, so `shard_size` at most. It may
            change between runs; answers do not depend on it, but for rounding.
        shard_size (`int`): prompts per shard.
        seed (`int`): of sampling.
        num_proc (`int`, *optional*): processes for tokenizing.
        max_new_tokens (`int`, *optional*), unmasking (`str`), settings: arguments of `generate()`. Answers have the
            length that the teacher was saved with, or 256 tokens, unless it is given.

    Returns:
        `Dataset`, one row for each prompt and in their order: the columns of `prompts`; `example_id`, the prompt's
        number; `input_ids`, prompt and answer up to and including the end-of-text; `prompt_length`, the tokens of the
        prompt; `response`, the answer's text; `num_forward_passes`; `unmasking_step`, for each token of the answer the
        pass (0, 1, ...) that wrote it; `correct` (None without a judge); `seed` and `settings` (JSON). It trains as it
        is: `dataset.filter(lambda row: row["correct"])`.

    Raises:
        ValueError: before any decoding, if prompts cannot be used, or if `output_dir` holds trajectories of another
            model, other prompts or other settings, naming what differs.
    """
    if not isinstance(prompts, Dataset) or "prompt" not in prompts.column_names:
        got = prompts.column_names if isinstance(prompts, Dataset) else type(prompts).__name__
        raise ValueError(f"`prompts` must be a `datasets.Dataset` with a column `prompt`, but got {got}.")
    if len(prompts) == 0:
        raise ValueError("`prompts` is empty: it must have at least one row.")
    taken = sorted(set(COLUMNS) & set(prompts.column_names))
    if taken:
        raise ValueError(f"`prompts` has the columns {taken}, which the trajectories need: rename them.")
    if "generation_config" in settings:
        raise ValueError("`generation_config` is not allowed: name its fields, which are saved with the answers.")
    if max_new_tokens is None:
        max_new_tokens = model.generation_config.max_new_tokens or 256
    settings = {"max_new_tokens": max_new_tokens, "unmasking": unmasking, **settings}
    # What the checkpoint's own configuration adds decides the answers, too.
    config = model.resolve_generation_config(**settings)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"`batch_size={batch_size!r}` is not allowed: it must be an integer of at least 1.")
    if (config.num_return_sequences or 1) != 1:
        raise ValueError(f"`num_return_sequences={config.num_return_sequences!r}` must be 1: repeat the prompts.")
    resolved = {name: value for name, value in config.to_dict().items() if name != "transformers_version"}
    limit = getattr(model.config, "max_position_embeddings", None)
    with PartialState().main_process_first():  # the other processes find the result in the cache
        prompts = prompts.map(
            lambda row: {"input_ids": tokenize_prompt(row, tokenizer)}, num_proc=num_proc, desc="Tokenizing"
        )
    for number, length in enumerate(map(len, prompts["input_ids"])):
        if limit is not None and length + max_new_tokens > limit:
            raise ValueError(
                f"Prompt {number} has {length} tokens: with `max_new_tokens={max_new_tokens}` that is more than "
                f"`config.max_position_embeddings={limit}`. Leave such prompts out, or lower `max_new_tokens`."
            )
    model.eval()

    verdicts = {}  # of this process, by example
    passes = []

    def is_right(row):
        try:
            answer = judge(row)
        except Exception as error:
            raise ValueError(
                f"`judge` failed on example {row['example_id']} with the columns {sorted(row)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if answer is None:
            raise ValueError(f"`judge` returned None for example {row['example_id']}: it must return True or False.")
        return bool(answer)

    def describe(rows):
        passes.extend(row["num_forward_passes"] for row in rows)
        words = {"NFE": f"{sum(passes) / len(passes):.1f}"}
        return words if judge is None else words | {"right": f"{sum(verdicts.values()) / len(verdicts):.1%}"}

    def decode_shard(number, shard):
        generator = torch.Generator(model.device).manual_seed(seed * 1_000_003 + number)
        answers = decode_prompts(
            model, tokenizer, shard["input_ids"], batch_size=batch_size, generator=generator, generation_config=config
        )
        rows = [{"example_id": number * shard_size + i, **answer} for i, answer in enumerate(answers)]
        if judge is not None:  # here, so that one that fails does so now, and not after hours
            for item, row in zip(shard, rows, strict=True):
                verdicts[row["example_id"]] = is_right({**item, **row})
        return rows

    job = {"model": model_digest(model), "prompts": rows_digest(prompts), "seed": seed, "generate": resolved}
    if config.unmasking == "learned_filter" and model.unmasking_filter is not None:
        job["unmasking_filter"] = model_digest(model.unmasking_filter)
    answers = map_in_shards(decode_shard, prompts, output_dir, job, shard_size, desc="Decoding", describe=describe)
    dataset = concatenate_datasets([prompts.remove_columns("input_ids"), answers], axis=1)
    correct = [None] * len(dataset) if judge is None else _judge_all(is_right, verdicts, dataset)
    dataset = dataset.add_column("correct", correct, feature=Value("bool"))
    dataset = dataset.add_column("seed", [seed] * len(dataset))
    return dataset.add_column("settings", [json.dumps(settings)] * len(dataset))


def _judge_all(is_right, verdicts, dataset):
    """The verdicts on all rows: each process has judged what it decoded, and takes its part of what was there."""
    state = PartialState()
    known = dict(gather_object(list(verdicts.items())))
    unknown = [i for i in range(len(dataset)) if i not in known][state.process_index :: state.num_processes]
    progress = tqdm(unknown, desc="Judging", leave=False, disable=not state.is_main_process)
    known |= dict(gather_object([(i, is_right(dataset[i])) for i in progress]))
    return [known[i] for i in range(len(dataset))]


def decode_prompts(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    batch_size: int,
    **settings: Any,
) -> list[dict]:
    """Answer prompts, each a list of token ids, with `model.generate_batch(**settings)`, `batch_size` at a time.

    Returns:
        For each prompt: `input_ids` (prompt and answer, up to and including the end-of-text), `prompt_length`,
        `response` (text), `num_forward_passes`, and `unmasking_step` (of the answer's tokens).
    """
    outputs = model.generate_batch(list(prompts), max_batch_size=batch_size, tokenizer=tokenizer, **settings)
    return [
        {
            "input_ids": [*output.prompt_ids, *output.generated_tokens[: output.num_tokens]],
            "prompt_length": len(output.prompt_ids),
            "response": tokenizer.decode(output.generated_tokens[: output.num_tokens], skip_special_tokens=True),
            "num_forward_passes": output.num_forward_passes,
            "unmasking_step": output.unmasking_step[: output.num_tokens],
        }
        for output in outputs.values()
    ]


def rows_digest(dataset: Dataset) -> str:
    """A hash of all rows, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for row in dataset:
        digest.update(repr(row).encode())
    return digest.hexdigest()


def model_digest(model: PreTrainedModel | PeftModel) -> str:
    """A hash of all weights and of the configuration, adapters' included."""
    ignored = ("_name_or_path", "transformers_version")
    config = {name: value for name, value in model.config.to_diff_dict().items() if name not in ignored}
    for name, adapter in (getattr(model, "peft_config", None) or {}).items():  # such as its scaling
        settings = {key: value for key, value in adapter.to_dict().items() if key != "base_model_name_or_path"}
        config[f"adapter {name}"] = {
            key: sorted(map(str, value)) if isinstance(value, (set, list, tuple)) else str(value)
            for key, value in settings.items()
        }
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor_checksum(tensor)}".encode())
    return digest.hexdigest()


def tensor_checksum(tensor: torch.Tensor, chunk: int = 2**24) -> int:
    """64 bits of a tensor's bytes, the same on every device: the sum of its 8-byte words, each times an odd number
    that its place decides, modulo 2**64. One changed word always shows. Made where the tensor is, so that the weights
    on a GPU need not be copied to the host."""
    values = tensor.detach().contiguous().flatten().view(torch.uint8)
    values = torch.nn.functional.pad(values, (0, -len(values) % 8)).view(torch.int64)
    total = 0
    for start in range(0, len(values), chunk):
        words = values[start : start + chunk]
        place = torch.arange(start, start + len(words), device=words.device)
        for factor, shift in ((0x1E3779B97F4A7C15, 31), (0x3F58476D1CE4E5B9, 27)):  # or neighbours would be alike
            place = place * factor
            place = place ^ (place >> shift)
        total += (words * (place | 1)).sum().item()
    return total % 2**64
