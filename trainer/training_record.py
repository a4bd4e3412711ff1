"""What a card says of a training, as the trainers know it."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftType
from transformers import Trainer, TrainingArguments

from dparallel.hub_cards.hub_ids import is_hub_id, looks_like_hub_id
from dparallel.hub_cards.measurements import here_and_now
from dparallel.hub_cards.model_cards import save_training

ARGUMENTS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "adam_beta1", "adam_beta2",
    "max_grad_norm", "num_train_epochs", "max_steps", "seed", "bf16", "fp16", "gradient_checkpointing",
)  # fmt: skip
NOT_OF_THE_METHOD = (
    "model_init_kwargs", "dataset_num_proc", "pad_to_multiple_of", "eval_decoding_samples", "eval_max_new_tokens",
    "eval_decoding_batch_size",
)  # fmt: skip
CACHED = re.compile(r"/([^/]+?)___([^/]+)/[^/]+/[0-9.]+/")
PACKAGES = ("dparallel", "transformers", "torch", "accelerate", "datasets", "peft")


def hub_datasets(*datasets: Any) -> list[str]:
    """Hub ids of the datasets that these were made from, as far as they tell: `load_dataset` keeps the rows of
    user/name in a folder user___name/configuration/version, and what `map` and `filter` make of them below it. What
    was saved and loaded again tells if its `info.dataset_name` is a Hub id."""
    ids = set()
    for dataset in datasets:
        if isinstance(dataset, Dataset):
            names = [CACHED.search(Path(file["filename"]).as_posix()) for file in dataset.cache_files]
            ids |= {"/".join(name.groups()) for name in names if name}
            ids |= {name for name in [dataset.info.dataset_name] if looks_like_hub_id(name)}
    return sorted(ids)


def training_record(trainer: Trainer, datasets: list[str]) -> dict:
    """Of a trainer, after training: model, data (Hub ids), arguments, adapter, versions, hardware, date."""
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    values = args.to_dict()  # plain ones: "cosine" for SchedulerType.COSINE
    own = [field.name for field in fields(args) if field.name not in TrainingArguments.__dataclass_fields__]
    names = [name for name in ARGUMENTS if name != ("num_train_epochs" if args.max_steps > 0 else "max_steps")]
    used = {name: values[name] for name in names if values[name] is not False}
    used |= {name: values[name] for name in own if name not in NOT_OF_THE_METHOD}
    arguments = {name: value for name, value in used.items() if value is not None}
    batch_size = trainer.get_total_train_batch_size(args)  # which `auto_find_batch_size` may have made smaller
    adapter = getattr(model, "peft_config", {}).get("default")
    source = (adapter.base_model_name_or_path if adapter else None) or model.config._name_or_path
    where = here_and_now(PACKAGES, is_gpu=args.device.type == "cuda")
    count = f"{args.world_size} x " if args.world_size > 1 else ""
    return {
        "trainer": type(trainer).__name__,
        "method": trainer._name,
        "paper": trainer._paper,
        "base_model": _model_name(source),
        "model_type": model.config.model_type,
        "datasets": datasets,
        "num_examples": len(trainer.train_dataset) if isinstance(trainer.train_dataset, Dataset) else None,
        "arguments": {"global batch": batch_size, **{name: str(value) for name, value in arguments.items()}},
        "adapter": adapter and _describe(adapter),
        "decoding": getattr(args, "decoding", None),
        "steps": trainer.state.global_step,
        **where,
        "hardware": f"{count}{where['hardware']}",
    }  # fmt: skip


def _model_name(source):
    """A Hub id, also of a copy in the Hub's cache; of another folder its name alone, as its path says nothing
    elsewhere."""
    copy = re.search(r"/models--([^/]+?)--([^/]+)/snapshots/", Path(source).as_posix())
    return "/".join(copy.groups()) if copy else source if is_hub_id(source) else Path(source).name


def _describe(adapter):
    """Those of LoRA's settings that an adapter has, and its kind if it is another."""
    settings = adapter.to_dict()
    found = {name: settings[name] for name in ("r", "lora_alpha") if settings.get(name) is not None}
    modules = settings.get("target_modules") or ()
    if adapter.peft_type != PeftType.LORA:
        found["peft_type"] = adapter.peft_type.value
    return found | {"target_modules": modules if isinstance(modules, str) else ", ".join(sorted(modules))}


def save_training_record(trainer: Trainer, datasets: list[str], folder: str | Path) -> None:
    save_training(training_record(trainer, datasets), folder)
