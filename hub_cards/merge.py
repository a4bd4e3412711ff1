"""From an adapter to a plain checkpoint that anybody loads."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, load_peft_weights
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

import dparallel.modeling  # noqa: F401  (registers the model families with AutoModelForCausalLM)

from .hub_ids import check_folder_or_hub_id, file_of, is_hub_id
from .model_cards import TRAINING_FILE, save_training

logger = logging.get_logger(__name__)

ADAPTER_FILE = "adapter_config.json"
LARGE_LOSS = 0.25  # of the adapter's changes, by rounding
ROWS_AT_A_TIME = 1024  # of a weight
# Where peft keeps the weight of a whole embedding or head, behind the module's name.
WHOLE_WEIGHTS = ("weight", "base_layer.weight", "original_module.weight", "token_adapter.base_layer.weight")


def merge_adapter(
    adapter: PeftModel | str | Path,
    output_dir: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    base_model: str | None = None,
    model_init_kwargs: dict[str, Any] | None = None,
    **generation_settings: Any,
) -> PreTrainedModel:
    """Merge an adapter into its base model and save the result: weights, remote code, tokenizer, a
    `generation_config.json` with the policy and threshold that the model was distilled for, and the `training.json`
    that its card is filled from.

        merge_adapter("out", "merged", unmasking="entropy_threshold", threshold=0.5)

    Embedding and head that share their weights go apart where the adapter makes them differ, and `config.json` says
    which of the two is the case. The result has the base model's dtype: a warning says where rounding to it loses much
    of what a LoRA adapter changes in linear layers, as after few steps in float32 on a model in bfloat16.

    Args:
        adapter (`PeftModel`, `str` or `Path`): the trained model, whose adapter is merged in place, or a folder or Hub
            id of an adapter, whose base model is then loaded.
        output_dir (`str` or `Path`): where the checkpoint goes; not where an adapter is, which would be applied to it
            again when it is loaded.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): defaults to the adapter's, or else to the base model's.
        base_model (`str`, *optional*): folder or Hub id of the base model, if it is not where the adapter says.
        model_init_kwargs (`dict`, *optional*): of `from_pretrained` for the base model; `dtype="auto"` by default.
        generation_settings: fields of `DiffusionGenerationConfig`. They are added to what the training says that the
            adapter was distilled for; one that names a policy, `unmasking`, stands in place of it.

    Returns:
        `PreTrainedModel`: the merged model.

    Raises:
        ValueError: before anything is written: if there is no adapter, if it is one that cannot be merged, if its base
            model is missing or lacks tokens that the adapter does not hold, if `output_dir` holds an adapter, or for
            wrong generation settings.
    """
    if (Path(output_dir) / ADAPTER_FILE).exists():
        raise ValueError(
            f"`output_dir={str(output_dir)!r}` is not allowed: it holds an adapter, which would be applied to the "
            f"merged model again when that is loaded. It must be another folder."
        )
    if isinstance(adapter, PreTrainedModel):
        raise ValueError(f"`adapter` is a {type(adapter).__name__} without an adapter: save_pretrained() is enough.")
    source = None
    if not isinstance(adapter, PeftModel):
        if not isinstance(adapter, (str, Path)):
            raise ValueError(f"`adapter` is a {type(adapter).__name__}: it must be a PeftModel, a folder or a Hub id.")
        source = str(adapter)
        _check_mergeable(_adapter_config(source))
        adapter = _load(source, base_model, model_init_kwargs or {})
    for name in adapter.active_adapters:
        _check_mergeable(adapter.peft_config[name])
    if not hasattr(adapter.base_model, "merge_and_unload"):
        raise ValueError(_has_nothing_to_merge(adapter.active_peft_config))
    training = getattr(adapter, "training_record", {}) if source is None else training_of(source)
    if "unmasking" not in generation_settings:
        generation_settings = {**(training.get("decoding") or {}), **generation_settings}
    # Before the merge, so that a wrong setting leaves the model as it was.
    generation_config = _updated(adapter.generation_config, generation_settings)
    if tokenizer is None:
        tokenizer = load_tokenizer(source, base_model or adapter.active_peft_config.base_model_name_or_path)
    _warn_of_rounding(adapter, is_loaded=source is not None)
    model = _merged(adapter)
    model.generation_config = generation_config
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    if training:
        model.training_record = training
        save_training(training, output_dir)
    return model


def load_adapted(
    adapter: str | Path,
    base_model: str | None = None,
    *,
    adapter_revision: str | None = None,
    **model_init_kwargs: Any,
) -> PeftModel:
    """Load an adapter on its base model, not merged, to decode as it was distilled to. An adapter that was trained
    after tokens were added holds the rows of all tokens; the base model is given as many before it is loaded.

    Args:
        adapter (`str` or `Path`): folder or Hub id of the adapter.
        base_model (`str`, *optional*): folder or Hub id of the base model, if it is not where the adapter says.
        adapter_revision (`str`, *optional*): branch, tag or commit of the adapter's repository.
        model_init_kwargs: of `from_pretrained` for the base model; `dtype="auto"` by default.

    Raises:
        ValueError: if there is no adapter, or its base model is missing or lacks tokens that the adapter does not
            hold.
    """
    model = _load(adapter, base_model, model_init_kwargs, adapter_revision)
    decode_as_distilled(model, adapter, adapter_revision)
    return model


def decode_as_distilled(model: PreTrainedModel | PeftModel, adapter: str | Path, revision: str | None = None) -> None:
    """Give a model the decoding that an adapter, a folder or Hub id, was distilled for."""
    model.generation_config.update(**_with_own_number(model.generation_config, decoding_of(adapter, revision)))


def load_tokenizer(
    adapter: str | Path | None = None,
    base_model: str | None = None,
    *,
    adapter_revision: str | None = None,
    **tokenizer_kwargs: Any,
) -> PreTrainedTokenizerBase:
    """The tokenizer beside an adapter, or else that of its base model: each a folder or Hub id, or None.

    Args:
        tokenizer_kwargs: of `from_pretrained`. `revision` is the base model's, `adapter_revision` the adapter's.

    Raises:
        ValueError: if there is neither, naming what is missing.
    """
    if adapter is not None and file_of(adapter, "tokenizer_config.json", adapter_revision):
        return AutoTokenizer.from_pretrained(adapter, **{**tokenizer_kwargs, "revision": adapter_revision})
    if not base_model:
        raise ValueError("`tokenizer=None`, and there is none beside the model, nor a known base model: pass one.")
    _check_base_model(base_model, adapter)
    return AutoTokenizer.from_pretrained(base_model, **tokenizer_kwargs)


def training_of(source: str | Path, revision: str | None = None) -> dict:
    """What the `training.json` of an adapter or a model, a folder or Hub id, says; {} if there is none."""
    path = file_of(source, TRAINING_FILE, revision)
    return json.loads(Path(path).read_text(encoding="utf-8")) if path else {}


def decoding_of(source: str | Path, revision: str | None = None) -> dict:
    """The arguments of `generate()` that an adapter or a model, a folder or Hub id, was distilled for; {} if its
    `training.json` does not say."""
    return training_of(source, revision).get("decoding") or {}


def _adapter_config(adapter, revision=None):
    check_folder_or_hub_id("adapter", adapter)
    if Path(adapter).is_dir() and not (Path(adapter) / ADAPTER_FILE).exists():
        raise ValueError(f"`adapter={str(adapter)!r}` is not allowed: the folder holds no adapter_config.json.")
    return PeftConfig.from_pretrained(str(adapter), revision=revision)


def _has_nothing_to_merge(config):
    return f"`adapter` is of type {config.peft_type.value}, which has no weights to merge."


def _check_mergeable(config):
    if config.is_prompt_learning:
        raise ValueError(_has_nothing_to_merge(config))
    if getattr(config, "alora_invocation_tokens", None):
        raise ValueError(
            "`adapter` is an activated LoRA (`alora_invocation_tokens`), which acts on some tokens alone: it has no "
            "weights to merge. Push it as it is (`merge=False`)."
        )


def _check_base_model(base_model, adapter=None, is_given=True):
    """Is there such a folder, or may the Hub have it?"""
    if Path(base_model).is_dir() or is_hub_id(base_model):
        return
    says = "" if is_given else f" in which `adapter={str(adapter)!r}` says that it is"
    raise ValueError(
        f"The base model {str(base_model)!r} is missing: there is no such folder{says}, and a Hub id is 'user/name'. "
        f"Pass `base_model=`, the folder or Hub id of the model that the adapter was trained on."
    )


def _load(adapter, base_model, model_init_kwargs, revision=None):
    """The adapter on its base model, with as many rows for tokens as it was trained with."""
    config = _adapter_config(adapter, revision)
    name, is_given = base_model or config.base_model_name_or_path, base_model is not None
    if not name:
        raise ValueError(
            f"`adapter={str(adapter)!r}` does not say which base model it was trained on: pass `base_model=`, its "
            f"folder or Hub id."
        )
    _check_base_model(name, adapter, is_given)
    try:
        pinned = {} if is_given or not config.revision else {"revision": config.revision}
        base = AutoModelForCausalLM.from_pretrained(name, **{"dtype": "auto", **pinned, **model_init_kwargs})
    except OSError as error:
        says = "" if is_given else f", which `adapter={str(adapter)!r}` names,"
        raise ValueError(
            f"The base model {str(name)!r}{says} could not be loaded: pass `base_model=`, the folder or Hub id of the "
            f"model that the adapter was trained on. ({error})"
        ) from error
    _resize(base, adapter, model_init_kwargs.get("trust_remote_code"), revision)
    return PeftModel.from_pretrained(base, str(adapter), revision=revision)


def _resize(base, adapter, trust_remote_code, revision):
    """Give embedding and head as many rows as those have that the adapter was trained with. Of tokens that were added
    the adapter must hold the rows: they are nowhere else."""
    parts = {"embedding": base.get_input_embeddings(), "head": base.get_output_embeddings()}
    rows, held, needed = len(parts["embedding"].weight), {}, 0
    names = {id(module): f"base_model.model.{name}." for name, module in base.named_modules()}
    for key, weight in load_peft_weights(str(adapter), device="cpu", revision=revision).items():
        for part, module in parts.items():
            suffix = key.removeprefix(names[id(module)])
            if suffix in WHOLE_WEIGHTS:
                held[part] = len(weight)
            elif suffix == "lora_embedding_A":
                needed = weight.shape[1]
            elif suffix == "lora_B.weight" and part == "head":
                needed = weight.shape[0]
    if file_of(adapter, "tokenizer_config.json", revision):
        kwargs = {"trust_remote_code": trust_remote_code, "revision": revision}
        needed = max(needed, len(AutoTokenizer.from_pretrained(adapter, **kwargs)))
    wanted = max(held.values(), default=max(rows, needed))
    missing = [part for part in parts if part not in held]
    if wanted > rows and missing and not (held and base.config.tie_word_embeddings):
        raise ValueError(
            f"`adapter={str(adapter)!r}` was trained with {wanted} tokens, and its base model has {rows}: the adapter "
            f"does not hold the others' rows of {' and '.join(missing)}. Merge the trained model before it leaves the "
            f"memory, or pass the resized model that it was trained on as `base_model=`."
        )
    if wanted != rows:
        base.resize_token_embeddings(wanted, mean_resizing=False)


def _with_own_number(generation_config, settings):
    """Settings that name another policy than the configuration's come with that policy's own threshold or steps."""
    if settings.get("unmasking", generation_config.unmasking) == generation_config.unmasking:
        return settings
    return {"threshold": None, "steps": None, **settings}


def _updated(generation_config, settings):
    """A copy of it with these settings."""
    config = copy.deepcopy(generation_config)
    unknown = config.update(**_with_own_number(config, settings))
    if unknown:
        raise ValueError(f"{sorted(unknown)} are no fields of {type(config).__name__}.")
    return config


def _merged(adapter):
    """The plain model. A weight that embedding and head share would take up what the adapter does to either of them:
    each is merged into its own, and they share one again if both came out the same."""
    base = adapter.get_base_model()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    shared = set() if head is None else set(embedding.parameters()) & set(head.parameters())
    for module in head.modules() if shared else ():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter in shared:
                setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
    if shared:
        base.config.tie_word_embeddings = False
    try:
        model = adapter.merge_and_unload(safe_merge=True)
    except NotImplementedError as error:
        raise ValueError(f"`adapter` cannot be merged: {error}") from error
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if shared and torch.equal(embedding.weight, head.weight):
        head.weight = embedding.weight
    if head is not None:
        model.config.tie_word_embeddings = head.weight is embedding.weight
    return model


@torch.no_grad()
def _warn_of_rounding(adapter, is_loaded):
    """Say how much of what LoRA changes in linear layers is lost where their weights are too coarse to hold it."""
    changed = lost = 0.0
    names = [name for name in adapter.active_adapters if _is_plain_lora(adapter.peft_config[name])]
    for module in adapter.base_model.modules():
        here = [name for name in names if name in getattr(module, "lora_A", ())]
        weight = getattr(module.get_base_layer(), "weight", None) if here else None
        if weight is None or not weight.is_floating_point() or weight.dtype.itemsize == 4:
            continue
        change = sum(module.get_delta_weight(name) for name in here)
        for before, wanted in zip(weight.split(ROWS_AT_A_TIME), change.split(ROWS_AT_A_TIME), strict=True):
            wanted = wanted.float()
            got = (before.float() + wanted).to(weight.dtype).float() - before.float()
            changed += wanted.square().sum().item()
            lost += (got - wanted).square().sum().item()
    if lost > LARGE_LOSS**2 * changed:
        how = "`model_init_kwargs={'dtype': 'float32'}`" if is_loaded else "`merge_adapter(model.float(), ...)`"
        logger.warning(
            f"Rounding loses {(lost / changed) ** 0.5:.0%} of what the adapter changes (root mean square): the base "
            f"model is in {adapter.dtype}. To keep it, merge in float32: {how}."
        )


def _is_plain_lora(config):
    return isinstance(config, LoraConfig) and not config.use_dora and not config.target_parameters
