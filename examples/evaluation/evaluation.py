"""Let a model answer a benchmark, judge it, and write down what it took."""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dparallel.hub_cards.measurements import RESULTS_FILE, Measurement, here_and_now
from dparallel.modeling import POLICIES
from dparallel.trainer import generate_trajectories
from dparallel.trainer.tokenization import tokenize_prompt
from dparallel.trainer.trajectories import decode_prompts

from .metrics import DecodingEfficiency
from .tasks import Task

SAMPLES_FILE = "samples.jsonl"
SECONDS_FILE = "seconds.json"
WHERE_FILE = "where.json"
SAMPLING_ARGUMENTS = ("do_sample", "temperature", "top_p", "top_k")
DECODING_ARGUMENTS = (  # of generate(), as commands take them
    "unmasking", "threshold", "steps", "steps_per_block", "schedule", "block_length", "block_cache", "cache_refresh",
    "cache_refresh_interval", "stop_at_eos", "eos_threshold",
)  # fmt: skip


def evaluate_task(
    task: Task,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str | Path,
    *,
    split: str | None = None,
    data: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 16,
    shard_size: int = 128,
    origin: dict[str, str] | None = None,
    warm_up: bool = False,
    **decoding: Any,
) -> Measurement:
    """Answer the questions of a benchmark with `model.generate(**decoding)`, on all processes of `accelerate launch`.

    Answers are saved as they come, in `output_dir/answers`: after a kill, the same call goes on with the missing ones,
    and what it writes is equal to that of an unbroken run, byte for byte; in bfloat16 if `batch_size` and `shard_size`
    stay as they were, since rounding depends on what is answered together. Out come, in `output_dir`,

    - `results.json`: a list `measurements` with the one that is returned, as model cards read it;
    - `samples.jsonl`: a line for each question with `example_id`, `prompt`, `response`, `num_forward_passes`,
      `num_tokens` (up to and including the end-of-text) and `correct`;
    - `seconds.json`: what decoding and judging took, the model's check sum included, if it was done in one go;
    - `where.json`: hardware, date and versions when it began.

    Args:
        task (`Task`): see `tasks`.
        model (`PreTrainedModel`), tokenizer (`PreTrainedTokenizerBase`): on its device.
        output_dir (`str` or `Path`): of this evaluation alone.
        split, data, limit, num_fewshot: see `Task.questions`.
        batch_size (`int`): questions in a batch, of one shard, so `shard_size` at most. It may change between runs;
            answers do not depend on it, but for rounding.
        shard_size (`int`): questions that are saved together; only among those do ended rows make room for others.
        origin (`dict`, *optional*): what the results say of where the model is from: `checkpoint`, `revision`,
            `adapter` and `adapter_revision`, see `Measurement`. By default what the model itself knows.
        warm_up (`bool`): decode a batch before the clock of `seconds.json` starts, and forget its answers: on a GPU,
            the first batch of a kind of decoding also loads kernels and captures CUDA graphs.
        decoding: arguments of `generate()`; what is not given is as the checkpoint has it, and `max_new_tokens` as the
            task. Unless `stop_at_eos=False`, decoding stops at the task's `stop_strings`, too.

    Raises:
        ValueError: for wrong arguments, or if `output_dir` holds answers of another evaluation.
        PermissionError: before any decoding, if answers are programs and HF_ALLOW_CODE_EVAL is not 1.
    """
    check_decoding(model, decoding)
    task.require_sandbox()
    questions = task.questions(split=split, data=data, limit=limit, num_fewshot=num_fewshot)
    if tokenizer.chat_template is None:
        questions = questions.map(lambda row: {"prompt": row["prompt"][0]["content"]})
    settings = {"unmasking": model.generation_config.unmasking, "max_new_tokens": task.max_new_tokens, **decoding}
    settings = stopping_at(task.stop_strings, model, settings)
    output_dir, is_new = Path(output_dir), has_no_answers(output_dir)
    if warm_up and is_new:
        _decode_a_batch(model, tokenizer, questions, batch_size, settings)
    start = time.perf_counter()
    PartialState().wait_for_everyone()  # before the first is written
    where = _where_it_began(output_dir, is_new)
    rows = generate_trajectories(
        model, tokenizer, questions, output_dir / "answers",
        lambda row: task.is_right(json.loads(row["row"]), task.first_answer(row["response"])),
        batch_size=batch_size, shard_size=shard_size, **settings,
    )  # fmt: skip
    taken = time.perf_counter() - start if is_new else None
    passes = rows["num_forward_passes"][:]
    tokens = [len(ids) - start for ids, start in zip(rows["input_ids"], rows["prompt_length"], strict=True)]
    measurement = Measurement(
        task=task.name,
        dataset=task.dataset if data is None or Path(data).is_dir() else Path(data).name,
        split=split or task.split,
        num_examples=len(rows),
        num_fewshot=task.num_fewshot if num_fewshot is None else num_fewshot,
        decoding=decoding,
        resolved_decoding=resolve_decoding(model, settings),
        **(origin_of(model) if origin is None else origin),
        accuracy=sum(rows["correct"]) / len(rows),
        **DecodingEfficiency().compute(num_forward_passes=passes, num_tokens=tokens),
        **where,
    )
    if PartialState().is_main_process:
        lines = [
            {
                **{name: row[name] for name in ("example_id", "prompt", "response", "num_forward_passes")},
                "num_tokens": count,
                "correct": row["correct"],
            }
            for row, count in zip(rows, tokens, strict=True)
        ]
        (output_dir / SAMPLES_FILE).write_text(
            "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
        )
        write_measurements([measurement], output_dir / RESULTS_FILE)
        if taken is not None:
            (output_dir / SECONDS_FILE).write_text(json.dumps(taken), encoding="utf-8")
    PartialState().wait_for_everyone()
    return measurement


def has_no_answers(output_dir: str | Path) -> bool:
    """Does an evaluation in this folder begin anew? Then its seconds are those of all answers."""
    return not any((Path(output_dir) / "answers").glob("shard-*"))


def _decode_a_batch(model, tokenizer, questions, batch_size, settings):
    """Of the first questions. Each process does so for itself, and nothing is saved."""
    first = questions.select(range(min(batch_size, len(questions))))
    generator = torch.Generator(model.device).manual_seed(0)
    ids = [tokenize_prompt(row, tokenizer) for row in first]
    decode_prompts(model, tokenizer, ids, batch_size=batch_size, generator=generator, **settings)


def stopping_at(stop_strings: Sequence[str], model: PreTrainedModel, settings: dict[str, Any]) -> dict:
    """Arguments of `generate()` with strings to stop at, where rows may end early at all."""
    config = model.resolve_generation_config(**settings)
    may_end = config.stop_at_eos and (config.pad_token_id is not None or config.eos_token_id is not None)
    return {"stop_strings": list(stop_strings), **settings} if stop_strings and may_end else settings


def resolve_decoding(model: PreTrainedModel, settings: dict[str, Any]) -> dict:
    """What decoding with these arguments of `generate()` goes by: theirs, the checkpoint's own, and the defaults."""
    config = model.resolve_generation_config(**settings)
    policy = POLICIES[config.unmasking]
    if policy.is_scheduled:
        number = {"steps": config.max_new_tokens if config.steps is None else config.steps}
    else:
        number = {"threshold": config.threshold}
    names = [
        name
        for name in (*DECODING_ARGUMENTS, *SAMPLING_ARGUMENTS, "stop_strings")
        if name not in ("threshold", "steps")
    ]
    found = {"unmasking": config.unmasking, **number, "max_new_tokens": config.max_new_tokens}
    found |= {name: value for name in names if (value := getattr(config, name)) is not None}
    hidden = {*(() if policy.is_scheduled else ("schedule",)), *(() if config.do_sample else SAMPLING_ARGUMENTS)}
    hidden |= {"cache_refresh", "cache_refresh_interval"} if config.block_cache in ("none", "exact") else set()
    return {name: value for name, value in found.items() if name not in hidden or name in settings}


def origin_of(model: PreTrainedModel) -> dict:
    """Where a model is from, as far as it knows: the Hub id, or the folder's name, and the commit on the Hub."""
    name = model.name_or_path
    found = {
        "checkpoint": Path(name).name if Path(name).is_dir() else name,
        "revision": getattr(model.config, "_commit_hash", None),
    }
    return {key: value for key, value in found.items() if value}


def check_decoding(model: PreTrainedModel, decoding: dict[str, Any]) -> None:
    """Refuse arguments of `generate()` that it would refuse, and such as have no effect, which tables would show.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """
    if "generation_config" in decoding:
        raise ValueError("`generation_config` is not allowed: name its fields, which the results can hold.")
    config = model.resolve_generation_config(**decoding)
    for name, why in config.ignored().items():
        if name in decoding:
            raise ValueError(f"`{name}={decoding[name]!r}` is not allowed: {why}, so it would have no effect.")


def _where_it_began(output_dir, is_new):
    """`here_and_now()` of the run that began, so that one that goes on, on another day, writes the same."""
    path, state = output_dir / WHERE_FILE, PartialState()
    if state.is_main_process and (is_new or not path.exists()):
        output_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(here_and_now()), encoding="utf-8")
    state.wait_for_everyone()
    return json.loads(path.read_text(encoding="utf-8"))


def seconds_of(output_dir: str | Path) -> float | None:
    """What an evaluation took, if it was done in one go."""
    path = Path(output_dir) / SECONDS_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def verdicts_of(output_dir: str | Path) -> list[bool]:
    """Which of its questions an evaluation has right."""
    return [
        json.loads(line)["correct"]
        for line in (Path(output_dir) / SAMPLES_FILE).read_text(encoding="utf-8").rstrip("\n").split("\n")
    ]


def to_entries(measurements: Iterable[Measurement]) -> list[dict]:
    """Measurements for JSON, with tokens per second beside the seconds, and without what is not known."""
    entries = [{**asdict(each), "tokens_per_second": each.tokens_per_second} for each in measurements]
    return [{name: value for name, value in entry.items() if value is not None} for entry in entries]


def write_measurements(measurements: Iterable[Measurement], path: str | Path) -> None:
    """A results file."""
    Path(path).write_text(json.dumps({"measurements": to_entries(measurements)}, indent=1) + "\n", encoding="utf-8")
