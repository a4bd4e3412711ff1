"""Students of a teacher, as studies train and compare them: each is trained once for its settings, and the curve of a
policy says in how many passes a model reaches an accuracy."""

import itertools
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from filelock import FileLock
from peft import PeftConfig
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from dparallel.hub_cards import merge_adapter
from dparallel.hub_cards.measurements import Measurement
from dparallel.trainer import CertaintyForcingConfig, CertaintyForcingTrainer
from dparallel.trainer.resumable_shards import map_in_shards
from dparallel.trainer.trajectories import rows_digest

from .plot import Curve


def train_student(
    teacher: str | Path,
    folder: Path,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: dict[str, Any],
    *,
    digest: str,
    peft_config: PeftConfig | None = None,
    **machine: Any,
) -> Path:
    """Distil a teacher, in float32, unless this was done before. Returns the folder of the student, in bfloat16.

    Args:
        teacher (`str` or `Path`): the model that students begin as.
        folder (`Path`): of this student alone. After a kill, the training begins again.
        dataset (`Dataset`): trajectories, with `input_ids` and `prompt_length`.
        tokenizer (`PreTrainedTokenizerBase`): of the teacher.
        settings (dict): fields of `CertaintyForcingConfig`.
        digest (`str`): of the teacher (`model_digest`).
        peft_config (`PeftConfig`, *optional*): train an adapter, which is merged, instead of all weights.
        machine: fields of `CertaintyForcingConfig` that decide nothing of the result, such as `dataset_num_proc`.

    Several processes may ask for the same student: one trains it, the others wait.

    Raises:
        ValueError: if `folder` has a student of another teacher, other answers or other settings, naming what differs;
            under `accelerate launch` with several processes, which this training does not take.
    """
    if PartialState().num_processes > 1:
        raise ValueError("A student is trained by one process: start this without `accelerate launch`.")
    answers = rows_digest(dataset.select_columns(["input_ids", "prompt_length"]))
    job = {"teacher": digest, "answers": answers, "settings": settings}
    if peft_config is not None:
        job["adapter"] = {name: str(value) for name, value in sorted(peft_config.to_dict().items()) if value}

    def compute(number, names):
        start = time.perf_counter()
        torch._dynamo.reset()  # else the compiler gives up after a number of students
        config = CertaintyForcingConfig(output_dir=str(folder / "training"), **settings, **machine)
        trainer = CertaintyForcingTrainer(
            AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32),
            config,
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
        )
        trainer.train()
        if peft_config is None:
            trainer.model.to(torch.bfloat16)
            trainer.save_model(str(folder / "model"))
        else:
            trainer.save_model(str(folder / "adapter"))
            merged = merge_adapter(trainer.model, folder / "model", tokenizer)
            merged.to(torch.bfloat16).save_pretrained(folder / "model")
        return [{"seconds": time.perf_counter() - start}]

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        map_in_shards(compute, [folder.name], folder, job, shard_size=1, desc=folder.name)
    return folder / "model"


def of_policy(points: Sequence[Measurement], unmasking: str) -> list[Measurement]:
    """The points of a policy, the fastest first."""
    return sorted((each for each in points if each.decoding["unmasking"] == unmasking), key=lambda each: each.nfe)


def nfe_at(points: Sequence[Measurement], accuracy: float) -> tuple[float, bool] | None:
    """The fewest passes in which a curve reaches an accuracy, interpolated between neighbours, and whether it may be
    less (the curve begins above); None if it does not.

    Args:
        points (list of `Measurement`): at least one, the fastest first.
        accuracy (`float`): from 0 to 1.
    """
    if points[0].accuracy >= accuracy:
        return points[0].nfe, True
    for fast, slow in itertools.pairwise(points):
        if slow.accuracy >= accuracy:
            share = (accuracy - fast.accuracy) / (slow.accuracy - fast.accuracy)
            return fast.nfe + share * (slow.nfe - fast.nfe), False
    return None


def spread(results: Sequence[tuple[float, bool] | None]) -> str:
    """In words, the mean, lowest and highest of what `nfe_at` says of several seeds."""
    reached = [result for result in results if result is not None]
    if len(reached) < len(results):
        return "not reached" if not reached else f"reached by {len(reached)} of {len(results)} seeds"
    sign = "≤ " if any(is_bound for _, is_bound in reached) else ""
    return sign + mean_and_range([value for value, _ in reached], 1)


def mean_and_range(values: Sequence[float], digits: int) -> str:
    """In words, the mean, and of several values the lowest and the highest."""
    mean, low, high = (f"{value:.{digits}f}" for value in (statistics.mean(values), min(values), max(values)))
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"


def folder_of(folder: Path, variant: str, seed: int) -> Path:
    """Of a student of this variant and seed."""
    return folder / "students" / f"{variant.replace(',', '').replace(' ', '-')}-seed-{seed}"


def curves_of_teacher(points: Sequence[Measurement], policies: Iterable[str]) -> list[Curve]:
    """In grey, one for each of at most four policies."""
    return [
        Curve(f"teacher, {policy.replace('_', ' ')}", of_policy(points, policy), "0.45", line)
        for policy, line in zip(policies, ("-.", "--", "-", ":"), strict=False)
    ]
