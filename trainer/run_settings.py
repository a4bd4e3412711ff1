"""What decides a training run: saved in its checkpoints, so that it does not go on as another run by mistake."""

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments

from .resumable_shards import differences, flattened

logger = get_logger(__name__)

SETTINGS_FILE = "settings.json"
# Of TrainingArguments, what decides the steps. Batches are compared by their global size.
DECISIVE = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args",
    "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16",
    "fp16", "neftune_noise_alpha", "seed", "data_seed", "train_sampling_strategy", "dataloader_drop_last",
)  # fmt: skip
# Of the trainers' own arguments, what changes nothing of the steps: where the model comes from, how fast, what is
# logged, and how evaluation and the saved model decode.
FREE = (
    "model_init_kwargs", "dataset_num_proc", "pad_to_multiple_of", "unmasking", "threshold", "eval_decoding_samples",
    "eval_max_new_tokens", "eval_decoding_batch_size",
)  # fmt: skip
# Schedules of the learning rate that do not look at the number of all steps.
ENDLESS_SCHEDULES = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau")
NOT_OF_AN_ADAPTER = (
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "runtime_config",
    "task_type",
)  # fmt: skip


def run_settings(args: TrainingArguments, dataset: Dataset | IterableDataset, batch_size: int | None) -> dict:
    """The settings of a run but those of its model.

    Args:
        args (`DiffusionTrainingConfig`): completed.
        dataset: the prepared `train_dataset`. Of a stream, nothing is known.
        batch_size (`int`, *optional*): rows of an optimizer step, over all processes, if that is known beforehand.
    """
    own = {field.name for field in fields(args)} - set(TrainingArguments.__dataclass_fields__) - set(FREE)
    settings = {name: getattr(args, name) for name in (*DECISIVE, *sorted(own))}
    is_endless = args.lr_scheduler_type in ENDLESS_SCHEDULES and not 0 < args.warmup_steps < 1
    if not is_endless or args.changes_with_progress:
        settings["max_steps"] = args.max_steps
        settings["num_train_epochs"] = None if args.max_steps > 0 else args.num_train_epochs
    if isinstance(dataset, Dataset):
        settings["train_dataset"] = {"rows": len(dataset), "digest": dataset_digest(dataset)}
    if batch_size is not None:
        settings["global batch size"] = batch_size
    return settings


def model_settings(model: PreTrainedModel | PeftModel) -> dict:
    """Those of a model or adapter, before its weights are sharded."""
    settings = {"model_type": model.config.model_type, "dtype": str(model.dtype), "adapter": {"peft_type": None}}
    if isinstance(model, PeftModel):
        adapter = model.peft_config[model.active_adapter].to_dict()
        settings["adapter"] = {name: adapter[name] for name in adapter if name not in NOT_OF_AN_ADAPTER}
        if digest := _frozen_digest(model):
            settings["weights under the adapter"] = digest
    return settings


def _as_json(value):
    return sorted(value) if isinstance(value, set) else str(value)


def save_settings(settings: dict[str, Any], checkpoint: str | Path) -> None:
    Path(checkpoint).mkdir(parents=True, exist_ok=True)
    (Path(checkpoint) / SETTINGS_FILE).write_text(
        json.dumps(settings, indent=1, default=_as_json) + "\n", encoding="utf-8"
    )


def changed_settings(checkpoint: str | Path, settings: dict[str, Any]) -> str:
    """What a checkpoint was trained with, and what differs now, in words; empty if nothing does. What only one of the
    two has, which another version may have saved, is not compared."""
    path = Path(checkpoint) / SETTINGS_FILE
    if not path.exists():
        logger.warning(f"{checkpoint} has no {SETTINGS_FILE}: whether it was trained with other settings is unknown.")
        return ""
    now = json.loads(json.dumps(settings, default=_as_json))
    saved, now = flattened(json.loads(path.read_text(encoding="utf-8"))), flattened(now)
    both = saved.keys() & now.keys()
    return differences({name: saved[name] for name in both}, {name: now[name] for name in both})


def dataset_digest(dataset: Dataset | IterableDataset) -> str:
    """A hash of the tokens of all prepared rows, in their order."""
    digest = hashlib.blake2b(digest_size=8)
    names = sorted({"input_ids", "prompt_length", "example_id", "unmasking_step"} & set(dataset.column_names))
    for table in dataset.select_columns(names).with_format("arrow").iter(10_000):
        for name in names:
            column = table[name]
            if name in ("input_ids", "unmasking_step"):
                digest.update(pc.list_value_length(column).to_numpy().astype(np.int64).tobytes())
                column = pc.list_flatten(column)
            digest.update(column.to_numpy().astype(np.int64).tobytes())
    return digest.hexdigest()


def _frozen_digest(model) -> str | None:
    """A hash of the beginning of each weight that is not trained, which tells one checkpoint of a family from another.
    None where weights are in parts already."""
    digest = hashlib.blake2b(digest_size=8)
    for weight in model.parameters():
        if hasattr(weight, "ds_shape") or weight.is_meta:
            return None
        if not weight.requires_grad and weight.is_floating_point():
            digest.update(weight.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()
